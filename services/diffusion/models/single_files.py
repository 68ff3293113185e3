"""Single safetensors files: which model each is, by its header alone. Reads no weights, loads no torch.

A checkpoint of no known shape needs its configs and tokenizer beside it, in a folder `NAME.config` as diffusers has it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from services.diffusion.models.entries import (
    CheckpointEntry,
    ControlNetEntry,
    EmbeddingEntry,
    Entry,
    VaeEntry,
    checkpoint_entry,
    controlnet_entry,
    license_of,
    part_id,
)
from services.diffusion.models.lora_entries import lora_entry
from services.diffusion.models.lora_names import is_lora
from services.diffusion.models.recipes import (
    CONFIG_LIMIT_BYTES,
    Config,
    Recipe,
    UnfitFolder,
    for_file,
    from_folder,
    shipped,
)
from services.kernel.files import StrangeFile, open_ordinary, read_limited
from services.weights.references.tensors import LENGTH_BYTES, BadHeader, header_length, parse_header

LDM_UNET = "model.diffusion_model."
LDM_FIRST = f"{LDM_UNET}input_blocks.0.0.weight"


class FileKind(Enum):
    CHECKPOINT = "checkpoint"
    CONTROLNET = "controlnet"
    LORA = "lora"
    VAE = "vae"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """Tensors' shapes by name, and the file's metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def width(self, ending: str) -> int:
        """The last dimension of a tensor whose name ends so; 0 where there is none."""
        return next((shape[-1] for name, shape in self.shapes.items() if name.endswith(ending) and shape), 0)


def read_header(path: Path) -> SafetensorsHeader:
    """Of one file, or of all in a folder of parts. UnfitFolder where one is not a valid safetensors file."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = _read_header(file)
        shapes.update(header.shapes)
        metadata.update(header.metadata)
    return SafetensorsHeader(shapes=shapes, metadata=metadata)


def _read_header(file: Path) -> SafetensorsHeader:
    try:
        with open_ordinary(file) as opened:
            first = opened.read(LENGTH_BYTES)
            header = opened.read(header_length(first))
        table = parse_header(first, header, size_bytes=file.stat().st_size)
    except (OSError, StrangeFile, BadHeader) as error:
        raise UnfitFolder(f"{file.name} is damaged: {error}") from error
    shapes = {tensor.name: tensor.shape for tensor in table.tensors}
    return SafetensorsHeader(shapes=shapes, metadata=json.loads(header).get("__metadata__", {}))


def kind_of(header: SafetensorsHeader) -> FileKind | None:
    """None for what this service does not use."""
    names = header.shapes
    if LDM_FIRST in names:
        return FileKind.CHECKPOINT
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.", "input_hint_block.")) for name in names):
        return FileKind.CONTROLNET
    if is_lora(names):
        return FileKind.LORA
    if any(name.endswith(("decoder.conv_in.weight", "decoder.layers.0.weight")) for name in names):
        return FileKind.VAE
    if names and len(names) <= 2 and all(1 <= len(shape) <= 2 for shape in names.values()):
        return FileKind.EMBEDDING
    return None


# Larger pickles are not textual inversions.
EMBEDDING_LIMIT_BYTES = 16 * 1024 * 1024
EMBEDDING_PICKLES = frozenset({".pt", ".bin"})
# The first layer's width and the width of the prompt embeddings.
_BASES = {(320, 768): "sd1", (320, 1024): "sd2", (320, 2048): "sdxl", (384, 1280): "refiner"}
_CONTROL_BASES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_TO_KEY = "attn2.to_k.weight"
# In the names of SD 2 models that were trained at 512 pixels and predict the noise.
_SMALL = re.compile(r"(512|base)", re.IGNORECASE)
# Nets that condition with their residuals' mean over the image.
_POOLING = "shuffle"


def read_file(path: Path) -> Entry | None:
    """Of a file, or a folder of files that are one; None for what this service does not use.

    UnfitFolder for a damaged or unsupported model.
    """
    header = read_header(path)
    try:
        return _entry(path, header, kind_of(header))
    except (IndexError, StopIteration) as error:
        raise UnfitFolder(f"{path.name} has a model's tensor names, but shapes of no supported model") from error


def _entry(path: Path, header: SafetensorsHeader, kind: FileKind | None) -> Entry | None:
    if kind is FileKind.CHECKPOINT:
        return _checkpoint(path, header)
    if kind is FileKind.CONTROLNET:
        return _controlnet(path, header)
    if kind is FileKind.LORA:
        return lora_entry(path, header.shapes, header.metadata)
    if kind is FileKind.VAE:
        return _vae(path, header)
    return _embedding(path, header) if kind is FileKind.EMBEDDING else None


def read_parts(folder: Path) -> CheckpointEntry | None:
    """A folder of the parts of one checkpoint, as the weight store makes it; None for any other."""
    entry = read_file(folder) if (folder / "unet.safetensors").is_file() else None
    return entry if isinstance(entry, CheckpointEntry) else None


def read_embedding_pickle(path: Path) -> EmbeddingEntry | None:
    """By its name alone; its content is read when it is used."""
    size_bytes = path.stat().st_size
    if path.suffix not in EMBEDDING_PICKLES or size_bytes > EMBEDDING_LIMIT_BYTES:
        return None
    return EmbeddingEntry(id=part_id(path), path=path, widths=(), vectors=0, size_bytes=size_bytes)


def _checkpoint(path: Path, header: SafetensorsHeader) -> CheckpointEntry:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    size_bytes = sum(file.stat().st_size for file in files)
    return checkpoint_entry(path, _recipe(path, header), size_bytes, is_ldm=True)


def _recipe(path: Path, header: SafetensorsHeader) -> Recipe:
    beside = path.with_name(f"{path.stem if path.is_file() else path.name}.config")
    if beside.is_dir():
        return from_folder(beside)
    width, channels = header.shapes[LDM_FIRST][0], header.shapes[LDM_FIRST][1]
    base = _BASES.get((width, _context(header)))
    if base is None:
        raise UnfitFolder(f"its shapes are those of no known model; {beside.name}/ could hold its configs")
    prediction_type = _prediction_type(path, header, base)
    is_small = base == "sd2" and prediction_type == "epsilon"
    return for_file(base, unet_channels=channels, prediction_type=prediction_type, is_small=is_small)


def _context(header: SafetensorsHeader) -> int:
    names = {name: shape for name, shape in header.shapes.items() if name.startswith(LDM_UNET)}
    return SafetensorsHeader(shapes=names).width(_TO_KEY)


def _prediction_type(path: Path, header: SafetensorsHeader, base: str) -> str:
    """From its metadata, its tensors or a .yaml beside it; for SD 2 else from the file's name, as in diffusers."""
    declared = header.metadata.get("modelspec.prediction_type", "")
    if declared in ("v", "v_prediction") or "v_pred" in header.shapes:
        return "v_prediction"
    if declared == "epsilon":
        return "epsilon"
    sidecar = path.with_suffix(".yaml")
    if sidecar.is_file():
        text = read_limited(sidecar, CONFIG_LIMIT_BYTES).decode(errors="replace")
        return "v_prediction" if re.search(r'parameterization:\s*"?v"?\s', text) else "epsilon"
    if base == "sd2":
        is_inpainting = header.shapes[LDM_FIRST][1] != shipped(base).unet["in_channels"]
        return "epsilon" if is_inpainting or _SMALL.search(path.stem) else "v_prediction"
    return ""


def _controlnet(path: Path, header: SafetensorsHeader) -> ControlNetEntry:
    base = _CONTROL_BASES.get(header.width(_TO_KEY))
    if base is None:
        raise UnfitFolder("its shapes are those of no known ControlNet")
    return controlnet_entry(path, control_config(base, is_pooling=_POOLING in path.stem), path.stat().st_size)


def control_config(base: str, *, is_pooling: bool) -> Config:
    """A ControlNet is a copy of its base's UNet."""
    unet = shipped(base).unet
    shared = {key: value for key, value in unet.items() if key not in _NOT_CONTROL}
    return {
        **shared,
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "global_pool_conditions": is_pooling,
    }


_NOT_CONTROL = frozenset({"_class_name", "center_input_sample", "out_channels", "sample_size", "up_block_types"})


def _vae(path: Path, header: SafetensorsHeader) -> VaeEntry:
    """The latents' channels from the decoder's first layer, their factor from how many blocks it has."""
    is_tiny = any(name.endswith("decoder.layers.0.weight") for name in header.shapes)
    blocks = {found[1] for name in header.shapes if (found := re.search(r"decoder\.(?:up|up_blocks)\.(\d+)\.", name))}
    first = "decoder.layers.0.weight" if is_tiny else "decoder.conv_in.weight"
    channels = next(shape[1] for name, shape in header.shapes.items() if name.endswith(first))
    return VaeEntry(
        id=part_id(path),
        path=path,
        latent_factor=8 if is_tiny else 2 ** (len(blocks) - 1),
        latent_channels=channels,
        is_tiny=is_tiny,
        size_bytes=path.stat().st_size,
        license=license_of(path),
    )


def _embedding(path: Path, header: SafetensorsHeader) -> EmbeddingEntry:
    """One tensor, or for SDXL `clip_l` and `clip_g`, in the order of its text encoders."""
    names = ("clip_l", "clip_g") if {"clip_l", "clip_g"} <= set(header.shapes) else tuple(header.shapes)
    shapes = [header.shapes[name] for name in names]
    if len(shapes) == 2 and names != ("clip_l", "clip_g"):
        raise UnfitFolder("it has several tensors that are no textual inversion")
    return EmbeddingEntry(
        id=part_id(path),
        path=path,
        widths=tuple(shape[-1] for shape in shapes),
        vectors=shapes[0][0] if len(shapes[0]) == 2 else 1,
        size_bytes=path.stat().st_size,
        license=license_of(path),
    )
