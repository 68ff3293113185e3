"""Single safetensors files: which model each is, by its header alone. Reads no weights, loads no torch.

A checkpoint of no known shape needs its configs and tokenizer beside it, in a folder `NAME.config` as diffusers has it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path

from services.diffusion.models.config_defaults import whole_recipe
from services.diffusion.models.controlnet_files import controlnet_of_file, is_controlnet
from services.diffusion.models.embedding_files import (
    EMBEDDING_LIMIT_BYTES,
    count_of,
    too_large,
    vectors_among,
    widths_of,
)
from services.diffusion.models.entries import (
    CheckpointEntry,
    EmbeddingEntry,
    Entry,
    VaeEntry,
    checkpoint_entry,
    license_of,
    part_id,
)
from services.diffusion.models.headers import SafetensorsHeader as SafetensorsHeader
from services.diffusion.models.headers import read_header as read_header
from services.diffusion.models.leftovers import check_kind, checked
from services.diffusion.models.lora_entries import lora_entry
from services.diffusion.models.lora_names import is_lora
from services.diffusion.models.marks import LDM_FIRST, LDM_UNET, context_width, with_marks, with_own_configs
from services.diffusion.models.quantized import check_quantized
from services.diffusion.models.recipes import Recipe, UnfitFolder, from_folder, shipped
from services.diffusion.models.unknown_files import foreign_kind, unknown_kind
from services.diffusion.models.vae_files import refuse_other_vae


class FileKind(Enum):
    CHECKPOINT = "checkpoint"
    CONTROLNET = "controlnet"
    LORA = "lora"
    VAE = "vae"
    EMBEDDING = "embedding"


def kind_of(header: SafetensorsHeader) -> FileKind | None:
    """None for what this service does not use."""
    names = header.shapes
    if is_controlnet(names):
        return FileKind.CONTROLNET
    if LDM_FIRST in names:
        return FileKind.CHECKPOINT
    if is_lora(names):
        return FileKind.LORA
    if any(name.endswith(("decoder.conv_in.weight", "decoder.layers.0.weight")) for name in names):
        return FileKind.VAE
    return FileKind.EMBEDDING if vectors_among(names) else None


# The first layer's width and the width of the prompt embeddings.
_BASES = {(320, 768): "sd1", (320, 1024): "sd2", (320, 2048): "sdxl", (384, 1280): "refiner"}
_TO_KEY = "attn2.to_k.weight"


def read_file(path: Path) -> Entry:
    """Of a file, or a folder of files that are one. UnfitFolder for what is damaged, unsupported or of no kind."""
    header = read_header(path)
    # What has a Stable Diffusion's first layer is compared with its family, name by name.
    if LDM_FIRST not in header.shapes and (what := foreign_kind(header.shapes)):
        raise UnfitFolder(f"it is {what}, which is not supported")
    try:
        return _entry(path, header, kind_of(header))
    except (IndexError, StopIteration) as error:
        raise UnfitFolder(f"{path.name} has a model's tensor names, but shapes of no supported model") from error


def _entry(path: Path, header: SafetensorsHeader, kind: FileKind | None) -> Entry:
    if kind in (FileKind.CHECKPOINT, FileKind.CONTROLNET, FileKind.LORA, FileKind.VAE):
        check_quantized(header)
    if kind is FileKind.CHECKPOINT:
        return _checkpoint(path, header)
    if kind is FileKind.CONTROLNET:
        return controlnet_of_file(path, header.shapes, size_bytes=path.stat().st_size)
    if kind is FileKind.LORA:
        return lora_entry(path, header.shapes, header.metadata)
    if kind is FileKind.VAE and not any(name.startswith(LDM_UNET) for name in header.shapes):
        return _vae(path, header)
    if kind is FileKind.EMBEDDING:
        return _embedding(path, header)
    raise UnfitFolder(unknown_kind(header.shapes))


def read_parts(folder: Path) -> CheckpointEntry | None:
    """A folder of the parts of one checkpoint, as the weight store makes it; None for any other."""
    entry = read_file(folder) if (folder / "unet.safetensors").is_file() else None
    return entry if isinstance(entry, CheckpointEntry) else None


def read_embedding_pickle(path: Path) -> EmbeddingEntry:
    """UnfitFolder for what is no textual inversion. Nothing of a large file is read, and nothing of a pickle runs."""
    from services.diffusion.models.embedding_pickles import pickled_shapes

    return _embedding_entry(path, pickled_shapes(path))


def _checkpoint(path: Path, header: SafetensorsHeader) -> CheckpointEntry:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    size_bytes = sum(file.stat().st_size for file in files)
    recipe = _recipe(path, header)
    needs = () if recipe.has_vae else ("it has no VAE, so requests must name one",)
    note = "; ".join([*recipe.notes, *needs])
    return replace(checkpoint_entry(path, recipe, size_bytes, is_ldm=True), note=note)


def _recipe(path: Path, header: SafetensorsHeader) -> Recipe:
    """From the configs beside it, or its family's with what the file says; UnfitFolder where it is not whole."""
    beside = path.with_name(f"{path.stem if path.is_file() else path.name}.config")
    if beside.is_dir():
        return checked(with_own_configs(whole_recipe(from_folder(beside)), header), header)
    width = header.shapes[LDM_FIRST][0]
    base = _BASES.get((width, context_width(header)), "")
    check_kind(header.shapes, base)
    if not base:
        raise UnfitFolder(f"its shapes are those of no known model; {beside.name}/ could hold its configs")
    return checked(with_marks(shipped(base), path, header), header)


def _vae(path: Path, header: SafetensorsHeader) -> VaeEntry:
    """The latents' channels from the decoder's first layer, their factor from how many blocks it has."""
    refuse_other_vae(header.shapes)
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
    size_bytes = path.stat().st_size
    if size_bytes > EMBEDDING_LIMIT_BYTES:
        raise UnfitFolder(too_large(size_bytes))
    return _embedding_entry(path, header.shapes)


def _embedding_entry(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> EmbeddingEntry:
    """UnfitFolder where none of the tensors, or several, could be its vectors."""
    names = vectors_among(shapes)
    if not names:
        raise UnfitFolder("its tensors are not those of a textual inversion")
    return EmbeddingEntry(
        id=part_id(path),
        path=path,
        widths=widths_of(shapes, names),
        vectors=count_of(shapes, names),
        size_bytes=path.stat().st_size,
        license=license_of(path),
    )
