"""Single safetensors files: which model each is, by its header alone. Reads no weights, loads no torch.

A checkpoint of no known shape needs its configs and tokenizer beside it, in a folder `NAME.config` as diffusers has it.
"""

import re
from enum import Enum
from pathlib import Path

from services.diffusion.models.entries import (
    CheckpointEntry,
    ControlNetEntry,
    EmbeddingEntry,
    Entry,
    LoraEntry,
    VaeEntry,
    checkpoint_entry,
    controlnet_entry,
    license_of,
    part_id,
)
from services.diffusion.models.headers import SafetensorsHeader as SafetensorsHeader
from services.diffusion.models.headers import read_header as read_header
from services.diffusion.models.leftovers import check_kind, checked
from services.diffusion.models.marks import LDM_FIRST, context_width, with_marks, with_own_configs
from services.diffusion.models.quantized import check_quantized
from services.diffusion.models.recipes import Config, Recipe, UnfitFolder, from_folder, shipped
from services.kernel.logs import get_logger

log = get_logger()

_LORA_PARTS = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")


class FileKind(Enum):
    CHECKPOINT = "checkpoint"
    CONTROLNET = "controlnet"
    LORA = "lora"
    VAE = "vae"
    EMBEDDING = "embedding"


def kind_of(header: SafetensorsHeader) -> FileKind | None:
    """None for what this service does not use."""
    names = header.shapes
    if LDM_FIRST in names:
        return FileKind.CHECKPOINT
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.", "input_hint_block.")) for name in names):
        return FileKind.CONTROLNET
    if any(name.startswith("lora_") or any(mark in name for mark in _LORA_PARTS) for name in names):
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
_LORA_INPUT = re.compile(r"attn2[._](?:processor[._])?to_k(?:_lora)?\.(?:lora_down|lora_A|down|lora\.down|hada_w1_b)")
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
    if kind in (FileKind.CHECKPOINT, FileKind.CONTROLNET, FileKind.VAE):
        check_quantized(header)
    if kind is FileKind.CHECKPOINT:
        return _checkpoint(path, header)
    if kind is FileKind.CONTROLNET:
        return _controlnet(path, header)
    if kind is FileKind.LORA:
        return _lora(path, header)
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
    """From the configs beside it, or its family's with what the file says; UnfitFolder where it is not whole."""
    beside = path.with_name(f"{path.stem if path.is_file() else path.name}.config")
    if beside.is_dir():
        return _noted(path, checked(with_own_configs(from_folder(beside), header), header))
    width = header.shapes[LDM_FIRST][0]
    base = _BASES.get((width, context_width(header)), "")
    check_kind(header.shapes, base)
    if not base:
        raise UnfitFolder(f"its shapes are those of no known model; {beside.name}/ could hold its configs")
    return _noted(path, checked(with_marks(shipped(base), path, header), header))


def _noted(path: Path, recipe: Recipe) -> Recipe:
    needs = [] if recipe.has_vae else ["it has no VAE, so requests must name one"]
    for note in [*recipe.notes, *needs]:
        log.warning("model_noted", model=path.name, note=note)
    return recipe


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


def _lora(path: Path, header: SafetensorsHeader) -> LoraEntry:
    widths = [shape[1] for name, shape in header.shapes.items() if _LORA_INPUT.search(name) and len(shape) > 1]
    return LoraEntry(
        id=part_id(path),
        path=path,
        cross_attention_dim=widths[0] if widths else 0,
        size_bytes=path.stat().st_size,
        license=license_of(path),
    )


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
