"""What a checkpoint's file says beside its weights: marks among the tensors, metadata, a .yaml beside it.

Each mark is honored, or the file is refused with a sentence that names it. Reads no weights but a few numbers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.diffusion.models.a1111_yaml import EPSILON, VELOCITY, YamlConfig, read_yaml
from services.diffusion.models.headers import SafetensorsHeader
from services.diffusion.models.recipes import Config, Recipe, UnfitFolder, changed
from services.kernel.logs import get_logger

log = get_logger()

LDM_UNET = "model.diffusion_model."
LDM_FIRST = f"{LDM_UNET}input_blocks.0.0.weight"
V_PRED, ZERO_SNR = "v_pred", "ztsnr"
EDM_MEAN, EDM_STD = "edm_mean", "edm_std"
EDM_V_MAX, EDM_V_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"
MARKS = frozenset({V_PRED, ZERO_SNR, EDM_MEAN, EDM_STD, EDM_V_MAX, EDM_V_MIN})

# Playground 2.5's, from its card; CosXL's lowest, as ComfyUI takes it where the file has none.
_PLAYGROUND_SCHEDULER: Config = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "prediction_type": EPSILON,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
}
_PLAYGROUND_SCALING = 0.5
_COSXL_SIGMA_MIN = 0.002
SIGMA_LIMIT = 1e6

# Of `modelspec.prediction_type` and ComfyUI's `modelspec.predict_key`.
_DECLARED = {"v": VELOCITY, "v_prediction": VELOCITY, "v-prediction": VELOCITY, "epsilon": EPSILON, "eps": EPSILON}
# By how `modelspec.architecture` begins; the longest first.
_ARCHITECTURES = (
    ("stable-diffusion-xl-v1-refiner", "refiner"),
    ("stable-diffusion-xl", "sdxl"),
    ("stable-diffusion-v2", "sd2"),
    ("stable-diffusion-v1", "sd1"),
)
_SD2_ARCHITECTURES = {"stable-diffusion-v2-512": EPSILON, "stable-diffusion-v2-768-v": VELOCITY}
# In the names of SD 2 models that were trained at 512 pixels and predict the noise.
_SMALL = re.compile(r"(512|base)", re.IGNORECASE)
# ComfyUI tells SD 2's velocity by this layer: its deviation is above the limit only in models that predict it.
_SD2_LAYER = f"{LDM_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_DEVIATION = 0.09
_SMALL_SIDE = 64
_RESOLUTION = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")
# Sides of images that a metadata's resolution is believed for.
RESOLUTION_MIN_PX, RESOLUTION_MAX_PX = 256, 2_048
_SIDE_MULTIPLE_PX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Changes of a family's recipe. `scheduler` is a whole config where it names a class."""

    scheduler: Config = field(default_factory=dict)
    unet: Config = field(default_factory=dict)
    vae: Config = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def with_marks(recipe: Recipe, path: Path, header: SafetensorsHeader) -> Recipe:
    """The shipped recipe of its family as this file is: its channels, prediction, noise and size."""
    marks = _read(recipe, path, header)
    scheduler = marks.scheduler if "_class_name" in marks.scheduler else {**recipe.scheduler, **marks.scheduler}
    unet = {**marks.unet, "in_channels": header.shapes[LDM_FIRST][1]}
    return changed(recipe, unet=unet, vae=marks.vae, scheduler=scheduler, notes=marks.notes)


def with_own_configs(recipe: Recipe, header: SafetensorsHeader) -> Recipe:
    """A recipe from the configs beside the file, which say all but what the file's own marks say otherwise."""
    _check_known(header)
    if edm := _edm(recipe, header):
        return changed(recipe, vae=edm.vae, scheduler=edm.scheduler)
    told: str = VELOCITY if V_PRED in header.shapes else recipe.scheduler.get("prediction_type", EPSILON)
    more = _zero_snr(told) if ZERO_SNR in header.shapes else {}
    return changed(recipe, scheduler={**recipe.scheduler, "prediction_type": told, **more})


def _read(recipe: Recipe, path: Path, header: SafetensorsHeader) -> Marks:
    _check_known(header)
    notes = _lies(recipe.base, header.metadata)
    sidecar, more = _sidecar(path, header)
    notes += more
    if edm := _edm(recipe, header):
        return Marks(scheduler=edm.scheduler, vae=edm.vae, unet=_size(header.metadata, notes), notes=tuple(notes))
    if sidecar is not None and sidecar.is_edm:
        raise UnfitFolder(f"its .yaml says EDM, and the file lacks {EDM_V_MAX}, which tells how much noise that is")
    prediction = _prediction(recipe, path, header, sidecar)
    scheduler: dict[str, Any] = {"prediction_type": prediction, **(sidecar.betas if sidecar else {})}
    if ZERO_SNR in header.shapes or (sidecar is not None and sidecar.has_zero_snr):
        scheduler |= _zero_snr(prediction)
    small = {"sample_size": _SMALL_SIDE} if recipe.base == "sd2" and scheduler["prediction_type"] == EPSILON else {}
    unet = {**small, **_size(header.metadata, notes)}
    return Marks(scheduler=scheduler, unet=unet, notes=tuple(notes))


def _check_known(header: SafetensorsHeader) -> None:
    """UnfitFolder for a half of a pair, or two marks that exclude each other."""
    names = header.shapes
    if (EDM_MEAN in names) != (EDM_STD in names):
        raise UnfitFolder(f"it has one of {EDM_MEAN} and {EDM_STD}, which go together")
    if EDM_V_MIN in names and EDM_V_MAX not in names:
        raise UnfitFolder(f"it has {EDM_V_MIN} without {EDM_V_MAX}")
    if EDM_MEAN in names and (EDM_V_MAX in names or V_PRED in names):
        raise UnfitFolder(f"it has {EDM_MEAN} and {V_PRED if V_PRED in names else EDM_V_MAX}, which exclude each other")


def _lies(base: str, metadata: Mapping[str, str]) -> list[str]:
    """A sentence where the metadata names another family than the tensors' shapes, which are believed."""
    told = metadata.get("modelspec.architecture", "").strip()
    if not told or "/" in told:
        return []
    named = next((family for start, family in _ARCHITECTURES if told.lower().startswith(start)), "")
    return [] if named == base else [f"its metadata calls it {told[:60]!r}, its tensors are of {base}"]


def _sidecar(path: Path, header: SafetensorsHeader) -> tuple[YamlConfig | None, list[str]]:
    """The .yaml beside it; one for a model with other prompt embeddings is passed over, with a sentence."""
    file = path.with_suffix(".yaml") if path.is_file() else path.with_name(f"{path.name}.yaml")
    found = read_yaml(file)
    if found is None and file.is_file():
        log.info("yaml_passed_over", file=file.name, reason="it is no model's config")
    if found is None or found.cross_attention_dim in (0, context_width(header)):
        return found, []
    return None, [f"{file.name} beside it is passed over: it is for a model of another family"]


def context_width(header: SafetensorsHeader) -> int:
    """The width of its prompt embeddings; 0 where its UNet does not show it."""
    ending = "attn2.to_k.weight"
    names = (name for name in header.shapes if name.startswith(LDM_UNET) and name.endswith(ending))
    return next((header.shapes[name][-1] for name in names if header.shapes[name]), 0)


def _told(header: SafetensorsHeader, sidecar: YamlConfig | None) -> str:
    """What the file says that it predicts: its mark, its metadata, its .yaml; empty where all are silent."""
    if V_PRED in header.shapes:
        return VELOCITY
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        declared = header.metadata.get(key, "").strip().lower()
        if declared and declared not in _DECLARED:
            raise UnfitFolder(f"its metadata says {key} {declared[:40]!r}, which is not supported")
        if declared:
            return _DECLARED[declared]
    return sidecar.prediction_type if sidecar is not None else ""


def _prediction(recipe: Recipe, path: Path, header: SafetensorsHeader, sidecar: YamlConfig | None) -> str:
    if told := _told(header, sidecar):
        return told
    if ZERO_SNR in header.shapes:
        # Without signal at the last step only velocity or the sample can be learned (Lin et al. 2024).
        return VELOCITY
    if recipe.base == "sd2":
        return _sd2_prediction(path, header)
    usual: str = recipe.scheduler["prediction_type"]
    return usual


def _sd2_prediction(path: Path, header: SafetensorsHeader) -> str:
    """From its metadata's architecture, else one layer's numbers, else the file's name as in diffusers."""
    if header.shapes[LDM_FIRST][1] != 4:
        return EPSILON
    architecture = header.metadata.get("modelspec.architecture", "").strip().lower()
    if architecture in _SD2_ARCHITECTURES:
        return _SD2_ARCHITECTURES[architecture]
    bias = header.numbers(_SD2_LAYER)
    deviation = _deviation(bias) if bias and all(map(math.isfinite, bias)) else 0.0
    if deviation:
        return VELOCITY if deviation > _SD2_DEVIATION else EPSILON
    return EPSILON if _SMALL.search(path.stem) else VELOCITY


def _deviation(numbers: Sequence[float]) -> float:
    """Of all of them. The library's module for that takes as long to import as all files here take to read."""
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))


def _zero_snr(prediction: str) -> Mapping[str, Any]:
    """Betas whose last step has no signal, and steps that begin there (Lin et al. 2024, arXiv 2305.08891)."""
    if prediction == EPSILON:
        raise UnfitFolder(f"it is marked {ZERO_SNR}, no signal at the last step, and says that it predicts noise")
    return {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edm:
    scheduler: Config
    vae: Config = field(default_factory=dict)


def _edm(recipe: Recipe, header: SafetensorsHeader) -> _Edm | None:
    """The formulation of Karras et al. 2022, as Playground 2.5 and CosXL have it; None for other checkpoints."""
    mark = next((name for name in (EDM_MEAN, EDM_V_MAX) if name in header.shapes), "")
    if not mark:
        return None
    if recipe.base not in ("sdxl", "") or not recipe.is_sdxl:
        raise UnfitFolder(f"it has {mark}, which is known of SDXL only, and it is {recipe.base or 'of another family'}")
    return _playground(header) if mark == EDM_MEAN else _cosxl(header)


def _playground(header: SafetensorsHeader) -> _Edm:
    mean, deviation = _marked(header, EDM_MEAN, 4), _marked(header, EDM_STD, 4)
    if min(deviation) <= 0:
        raise UnfitFolder(f"its {EDM_STD} is not above 0")
    return _Edm(
        scheduler=_PLAYGROUND_SCHEDULER,
        vae={"latents_mean": mean, "latents_std": deviation, "scaling_factor": _PLAYGROUND_SCALING},
    )


def _cosxl(header: SafetensorsHeader) -> _Edm:
    [highest] = _marked(header, EDM_V_MAX, 1)
    [lowest] = _marked(header, EDM_V_MIN, 1) if EDM_V_MIN in header.shapes else [_COSXL_SIGMA_MIN]
    if not 0 < lowest < highest <= SIGMA_LIMIT:
        raise UnfitFolder(f"its {EDM_V_MIN} and {EDM_V_MAX} are {lowest:g} and {highest:g}, which is no range of noise")
    # As its authors' config for diffusers.
    return _Edm(
        scheduler={
            "_class_name": "EDMEulerScheduler",
            "prediction_type": VELOCITY,
            "sigma_data": 1.0,
            "sigma_max": highest,
            "sigma_min": lowest,
            "sigma_schedule": "exponential",
        }
    )


def _marked(header: SafetensorsHeader, name: str, count: int) -> list[float]:
    numbers = header.numbers(name)
    if numbers is None or len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise UnfitFolder(f"its {name} is not {count} finite numbers")
    return [float(number) for number in numbers]


def _size(metadata: Mapping[str, str], notes: list[str]) -> Config:
    """The UNet's `sample_size` (height, width) from `modelspec.resolution`; a sentence for one that is no size."""
    told = metadata.get("modelspec.resolution", "").strip().lower()
    if not told:
        return {}
    found = _RESOLUTION.fullmatch(told)
    sides: Sequence[int] = [int(found[1]), int(found[2] or found[1])] if found else []
    if sides and all(RESOLUTION_MIN_PX <= side <= RESOLUTION_MAX_PX for side in sides):
        width, height = (side // _SIDE_MULTIPLE_PX for side in sides)
        return {"sample_size": [height, width]}
    notes.append(f"its metadata's resolution {told[:40]!r} is passed over")
    return {}
