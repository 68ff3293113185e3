"""What is in a safetensors file, told from its header alone. Loads no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from services.diffusion.models.recipes import UnfitFolder
from services.weights.tensors import LENGTH_BYTES, BadHeader, header_length, parse_header

LDM_UNET = "model.diffusion_model."
LDM_FIRST = f"{LDM_UNET}input_blocks.0.0.weight"
_LORA_MARKS = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")


class Kind(Enum):
    CHECKPOINT = "checkpoint"
    CONTROLNET = "controlnet"
    LORA = "lora"
    VAE = "vae"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Tensors' shapes by name, and the texts beside them."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def width(self, ending: str) -> int:
        """The last dimension of a tensor whose name ends so; 0 where there is none."""
        return next((shape[-1] for name, shape in self.shapes.items() if name.endswith(ending) and shape), 0)


def read_header(path: Path) -> Header:
    """Of one file, or of all in a folder of parts. UnfitFolder where it is no sound safetensors file."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = _read(file)
        shapes.update(header.shapes)
        metadata.update(header.metadata)
    return Header(shapes=shapes, metadata=metadata)


def _read(file: Path) -> Header:
    try:
        with file.open("rb") as opened:
            first = opened.read(LENGTH_BYTES)
            header = opened.read(header_length(first))
        table = parse_header(first, header, size_bytes=file.stat().st_size)
    except (OSError, BadHeader) as error:
        raise UnfitFolder(f"{file.name} is damaged: {error}") from error
    shapes = {tensor.name: tensor.shape for tensor in table.tensors}
    return Header(shapes=shapes, metadata=json.loads(header).get("__metadata__", {}))


def kind_of(header: Header) -> Kind | None:
    """None for what this service does not use."""
    names = header.shapes
    if LDM_FIRST in names:
        return Kind.CHECKPOINT
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.", "input_hint_block.")) for name in names):
        return Kind.CONTROLNET
    if any(name.startswith("lora_") or any(mark in name for mark in _LORA_MARKS) for name in names):
        return Kind.LORA
    if any(name.endswith(("decoder.conv_in.weight", "decoder.layers.0.weight")) for name in names):
        return Kind.VAE
    if names and len(names) <= 2 and all(1 <= len(shape) <= 2 for shape in names.values()):
        return Kind.EMBEDDING
    return None
