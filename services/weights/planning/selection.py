"""Which of a repository's files a pipeline needs, and why not the others; which part of a model a tensor belongs to.

Pure; knows names and sizes, not contents.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from fanlight.errors import FailedPrecondition, InvalidField
from services.weights.references.manifest import Manifest, TensorEntry, WeightFile

UNET = "unet"
TEXT_ENCODER = "text_encoder"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"
EMA = "ema"
OTHER = "other"
# Tensor name prefixes of the original implementation (CompVis), used by single-file checkpoints.
_SINGLE_FILE = (
    ("model.diffusion_model.", UNET),
    ("model_ema.", EMA),
    ("first_stage_model.encoder.", VAE_ENCODER),
    ("first_stage_model.quant_conv.", VAE_ENCODER),
    ("first_stage_model.", VAE_DECODER),
    ("cond_stage_model.", TEXT_ENCODER),
    ("conditioner.", TEXT_ENCODER),
)

_VAE = (
    ("encoder.", VAE_ENCODER),
    ("quant_conv.", VAE_ENCODER),
    ("decoder.", VAE_DECODER),
    ("post_quant_conv.", VAE_DECODER),
)

PIPELINES = ("text2img", "img2img", "inpaint", "controlnet", "controlnet_img2img", "controlnet_inpaint")
# Pipelines that encode an image to latents; the others need only the decoder of the VAE.
ENCODING_PIPELINES = frozenset({"img2img", "inpaint", "controlnet_img2img", "controlnet_inpaint"})
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PRECISIONS = ("fp16", "fp32")
# Kind of a manifest of one file that was named by its address: any bytes. Loading checks them.
PLAIN_FILE = "file"
_OTHER_FORMATS = {
    ".msgpack": "Flax",
    ".h5": "TensorFlow",
    ".onnx": "ONNX",
    ".onnx_data": "ONNX",
    ".pb": "TensorFlow",
    ".xml": "OpenVINO",
    ".tflite": "TensorFlow Lite",
    ".gguf": "GGUF",
    ".ot": "Rust",
    ".mlmodel": "Core ML",
    ".mlpackage": "Core ML",
}

_WEIGHTS = (".safetensors", *PICKLES)
_CONFIG = re.compile(r"\.(json|txt|model)$")
_VARIANT = re.compile(r"[._](fp16|bf16|fp32|non_ema|ema)(?=[._-]|$)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
# transformers names the same weights pytorch_model.bin or model.safetensors.
_STEMS = {"pytorch_model": "model"}


def part_of(tensor_name: str) -> str:
    return next((part for prefix, part in _SINGLE_FILE if tensor_name.startswith(prefix)), OTHER)


def part_of_vae(tensor_name: str) -> str:
    return next((part for prefix, part in _VAE if tensor_name.startswith(prefix)), OTHER)


def is_single_file(names: Iterable[str]) -> bool:
    """Whether these are the tensor names of a complete checkpoint in one file."""
    parts = {part_of(name) for name in names}
    return UNET in parts and len(parts - {EMA}) > 1


def is_vae(names: Iterable[str]) -> bool:
    parts = {part_of_vae(name) for name in names}
    return parts == {VAE_ENCODER, VAE_DECODER}


def by_part(tensors: Iterable[TensorEntry]) -> dict[str, tuple[TensorEntry, ...]]:
    """The tensors of a single-file checkpoint, grouped by part."""
    ordered = sorted(tensors, key=lambda t: (part_of(t.name), t.begin))
    return {part: tuple(group) for part, group in groupby(ordered, key=lambda t: part_of(t.name))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the files are needed for. Without a pipeline: everything that any pipeline needs."""

    pipeline: str = ""
    safety_checker: bool = False
    precision: str = "fp16"
    allow_pickle: bool = False
    # Pickles that the catalog pins by sha256.
    pinned_pickles: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        if self.pipeline and self.pipeline not in PIPELINES:
            raise InvalidField(f"{self.pipeline!r} is not one of {', '.join(PIPELINES)}", field="pipeline")
        if self.precision not in PRECISIONS:
            raise InvalidField(f"{self.precision!r} is not one of {', '.join(PRECISIONS)}", field="precision")

    @property
    def encodes(self) -> bool:
        return not self.pipeline or self.pipeline in ENCODING_PIPELINES

    def takes(self, file: WeightFile) -> bool:
        """Whether the file may be loaded: not a pickle, or one that is allowed or pinned."""
        if not file.path.endswith(PICKLES):
            return True
        return self.allow_pickle or (bool(file.sha256) and file.sha256 in self.pinned_pickles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    file: WeightFile
    is_wanted: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    """One variant of a component: its files (several if sharded), format and precision."""

    files: tuple[WeightFile, ...]
    is_safetensors: bool
    variant: str

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)


def choose(manifest: Manifest, selection: Selection) -> list[Choice]:
    """Decide for every file of the manifest. FailedPrecondition if nothing can be loaded."""
    if manifest.is_one_of:
        choices = _choose_one(manifest.files, selection)
    elif manifest.is_chosen:
        choices = [_chosen(f, selection, is_plain=manifest.kind == PLAIN_FILE) for f in manifest.files]
    else:
        choices = _choose_from_repository(manifest, selection)
    if not any(c.is_wanted for c in choices):
        raise FailedPrecondition(_nothing(manifest), field="reference")
    _require_weights(manifest, choices)
    return choices


def _chosen(file: WeightFile, selection: Selection, *, is_plain: bool) -> Choice:
    if file.skip:
        return Choice(file=file, is_wanted=False, why=file.skip)
    if not is_plain and not selection.takes(file):
        return Choice(file=file, is_wanted=False, why="a pickle that no catalog entry pins")
    return Choice(file=file, is_wanted=True, why="named by the reference")


def _choose_one(files: Sequence[WeightFile], selection: Selection) -> list[Choice]:
    """The first file is the source's own choice; fp16 is asked for by default and overrides nothing."""
    loadable = [file for file in files if selection.takes(file)]
    is_asked = selection.precision != "fp16"
    wanted = [file for file in loadable if is_asked and file.precision == selection.precision]
    best = next(iter([*wanted, *loadable]), None)
    return [
        _chosen(file, selection, is_plain=False)
        if file is best or not selection.takes(file)
        else Choice(file=file, is_wanted=False, why=f"{file.precision or 'another precision'}: another file is fetched")
        for file in files
    ]


def _choose_from_repository(manifest: Manifest, selection: Selection) -> list[Choice]:
    is_pipeline = any(f.path == "model_index.json" for f in manifest.files)
    copies: dict[str, list[WeightFile]] = defaultdict(list)
    choices: list[Choice] = []
    for file in manifest.files:
        why = file.skip or _skip_by_name(file, selection, is_pipeline)
        if why:
            choices.append(Choice(file=file, is_wanted=False, why=why))
        elif file.path.endswith(_WEIGHTS):
            copies[_component(file.path)].append(file)
        else:
            choices.append(_choose_config(file, is_pipeline))
    if not is_pipeline:
        _refuse_several(manifest, copies)
    for files in copies.values():
        choices.extend(_choose_copy(files, selection))
    return choices


def _skip_by_name(file: WeightFile, selection: Selection, is_pipeline: bool) -> str:
    folder = file.path.rpartition("/")[0]
    ending = "." + file.basename.rpartition(".")[2]
    if ending in _OTHER_FORMATS or folder.split("/")[0] in ("onnx", "openvino", "flax"):
        return f"another format: {_OTHER_FORMATS.get(ending, folder)}"
    if folder.startswith("vae_1_0"):
        return "an older VAE"
    if folder == "safety_checker" and not selection.safety_checker:
        return "the safety checker is off"
    if folder == "feature_extractor" and not selection.safety_checker:
        return "needed by the safety checker only, which is off"
    if is_pipeline and not folder and file.path.endswith(_WEIGHTS):
        return "the whole pipeline in one file; its components are fetched instead"
    return ""


def _choose_config(file: WeightFile, is_pipeline: bool) -> Choice:
    folder, name = file.path.rpartition("/")[0], file.basename
    is_hidden = name.startswith(".") or folder.startswith(".")
    is_needed = bool(_CONFIG.search(name)) and not is_hidden
    if is_needed and not folder and is_pipeline:
        is_needed = name == "model_index.json"
    elif is_needed and not folder:
        is_needed = name.endswith(".json")
    if name.endswith(".index.json"):
        is_needed = ".safetensors.index" in name or "fp16" in name
    why = "configuration" if is_needed else "not needed to make an image"
    return Choice(file=file, is_wanted=is_needed, why=why)


def _component(path: str) -> str:
    """The component that a weights file is a copy of: folder and name without variant, shard and suffix."""
    folder, _, name = path.rpartition("/")
    stem = _SHARD.sub("", _VARIANT.sub("", name.rpartition(".")[0]))
    return f"{folder}/{_STEMS.get(stem, stem)}"


def _variant(path: str) -> str:
    found = _VARIANT.findall(path.rpartition("/")[2])
    return "+".join(sorted(set(found))) if found else ""


def _choose_copy(files: Sequence[WeightFile], selection: Selection) -> Iterable[Choice]:
    groups: dict[tuple[bool, str], list[WeightFile]] = defaultdict(list)
    for file in files:
        groups[file.path.endswith(".safetensors"), _variant(file.path)].append(file)
    copies = [
        _Copy(files=tuple(group), is_safetensors=safe, variant=variant) for (safe, variant), group in groups.items()
    ]
    loadable = [c for c in copies if all(selection.takes(f) for f in c.files)]
    best = min(loadable, key=lambda c: _rank(c, selection), default=None)
    for copy in copies:
        why = _why_best(copy) if copy is best else _why_not(copy, best, selection)
        yield from (Choice(file=f, is_wanted=copy is best, why=why) for f in copy.files)


def _rank(copy: _Copy, selection: Selection) -> tuple[bool, bool, int, int]:
    """Sort key: safetensors before pickles, training copies last, then precision, then size."""
    wanted = "fp16" if selection.precision == "fp16" else ""
    order = [wanted, "bf16" if wanted else "fp32", "", "fp16"]
    precision = order.index(copy.variant) if copy.variant in order else len(order)
    return ("non_ema" in copy.variant, not copy.is_safetensors, precision, copy.size_bytes)


def _why_best(copy: _Copy) -> str:
    kind = "safetensors" if copy.is_safetensors else "pickle, allowed"
    return f"{copy.variant} {kind}".strip()


def _why_not(copy: _Copy, best: _Copy | None, selection: Selection) -> str:
    if "non_ema" in copy.variant:
        return "a copy for training (not averaged)"
    if not copy.is_safetensors:
        return "a pickle" if best else "a pickle that no catalog entry pins"
    chosen = best.variant if best and best.variant else "another precision"
    return f"{copy.variant or 'fp32'}: {chosen} is fetched for {selection.precision}"


def _refuse_several(manifest: Manifest, copies: dict[str, list[WeightFile]]) -> None:
    """FailedPrecondition for a repository of several checkpoints: it is not one model."""
    roots = [files for component, files in copies.items() if component.startswith("/")]
    if len(roots) > 1 and not any(f.path == "config.json" for f in manifest.files):
        names = ", ".join(sorted(f.path for files in roots for f in files)[:12])
        raise FailedPrecondition(
            f"{manifest.reference} has {len(roots)} models ({names}); name one: hf:ORG/REPO/FILE", field="reference"
        )


def _nothing(manifest: Manifest) -> str:
    pickles = [f.path for f in manifest.files if f.path.endswith(PICKLES)]
    if pickles:
        return f"{manifest.reference} has no safetensors, only pickles ({pickles[0]}), and no catalog entry pins them"
    return f"{manifest.reference} has no weights that can be loaded"


def _require_weights(manifest: Manifest, choices: Sequence[Choice]) -> None:
    """FailedPrecondition if a component's only weights are pickles: they must not be skipped silently."""
    weights = [c for c in choices if c.file.path.endswith(_WEIGHTS)]
    held = {_component(c.file.path) for c in weights if c.is_wanted}
    for choice in weights:
        if _component(choice.file.path) not in held and choice.why.startswith("a pickle that no"):
            raise FailedPrecondition(
                f"{manifest.reference}: {choice.file.path} is a pickle and no catalog entry pins it; "
                "set FANLIGHT_WEIGHTS_ALLOW_PICKLE=true to allow it",
                field="reference",
            )
    if not weights and not manifest.is_chosen:
        raise FailedPrecondition(_nothing(manifest), field="reference")
