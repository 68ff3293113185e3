"""Single safetensors files: which model each is, by its header alone. Reads no weights, loads no torch.

A checkpoint of no known shape needs its configs and tokenizer beside it, in a folder `NAME.config` as diffusers has it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from services.diffusion.models.config_defaults import whole_recipe
from services.diffusion.models.controlnet_files import controlnet_of_file, is_controlnet
from services.diffusion.models.embedding_files import (
    EMBEDDING_LIMIT_BYTES,
    count_of,
    vectors_among,
    widths_of,
)
from services.diffusion.models.embedding_pickles import pickled_shapes, too_large
from services.diffusion.models.entries import (
    CheckpointEntry,
    EmbeddingEntry,
    Entry,
    VaeEntry,
    checkpoint_entry,
    license_of,
    part_id,
)
from services.diffusion.models.lora_entries import lora_entry
from services.diffusion.models.lora_names import is_lora
from services.diffusion.models.recipes import (
    CONFIG_LIMIT_BYTES,
    Recipe,
    UnfitFolder,
    for_file,
    from_folder,
    shipped,
)
from services.diffusion.models.unknown_files import foreign_kind, unknown_kind
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
# In the names of SD 2 models that were trained at 512 pixels and predict the noise.
_SMALL = re.compile(r"(512|base)", re.IGNORECASE)


def read_file(path: Path) -> Entry:
    """Of a file, or a folder of files that are one. UnfitFolder for what is damaged, unsupported or of no kind."""
    header = read_header(path)
    if what := foreign_kind(header.shapes):
        raise UnfitFolder(f"it is {what}, which is not supported")
    try:
        return _entry(path, header, kind_of(header))
    except (IndexError, StopIteration) as error:
        raise UnfitFolder(f"{path.name} has a model's tensor names, but shapes of no supported model") from error


def _entry(path: Path, header: SafetensorsHeader, kind: FileKind | None) -> Entry:
    if kind is FileKind.CHECKPOINT:
        return _checkpoint(path, header)
    if kind is FileKind.CONTROLNET:
        return controlnet_of_file(path, header.shapes, size_bytes=path.stat().st_size)
    if kind is FileKind.LORA:
        return lora_entry(path, header.shapes, header.metadata)
    if kind is FileKind.VAE:
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
    return _embedding_entry(path, pickled_shapes(path))


def _checkpoint(path: Path, header: SafetensorsHeader) -> CheckpointEntry:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    size_bytes = sum(file.stat().st_size for file in files)
    return checkpoint_entry(path, _recipe(path, header), size_bytes, is_ldm=True)


def _recipe(path: Path, header: SafetensorsHeader) -> Recipe:
    beside = path.with_name(f"{path.stem if path.is_file() else path.name}.config")
    if beside.is_dir():
        return whole_recipe(from_folder(beside))
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
