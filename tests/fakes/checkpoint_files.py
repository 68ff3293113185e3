"""Single files of whole checkpoints: all names of a family, with holes or small tensors behind them."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from services.diffusion.models.ldm_names import text_names, unet_names, vae_names
from services.diffusion.models.marks import LDM_FIRST, LDM_UNET
from services.diffusion.models.recipes import shipped
from services.weights.references.tensors import DTYPE_BITS
from tests.fakes.ldm_files import _unet_name, _vae_name

TEXT_HEADS = {
    "sd1": (("cond_stage_model.transformer.text_model.", False),),
    "sd2": (("cond_stage_model.model.", True),),
    "sdxl": (("conditioner.embedders.0.transformer.text_model.", False), ("conditioner.embedders.1.model.", True)),
    "refiner": (("conditioner.embedders.0.model.", True),),
}
BASES = {(320, 768): "sd1", (320, 1024): "sd2", (320, 2048): "sdxl", (384, 1280): "refiner"}


def whole_names(base: str) -> list[str]:
    """As the service expects them; `whole_shapes` has them from diffusers' own modules."""
    recipe = shipped(base)
    texts = zip(recipe.texts, TEXT_HEADS[base], strict=True)
    return [
        *(f"{LDM_UNET}{name}" for name in unet_names(recipe.unet)),
        *(f"first_stage_model.{name}" for half in (True, False) for name in vae_names(recipe.vae, is_encoder=half)),
        *(f"{head}{name}" for text, (head, is_open) in texts for name in text_names(text, is_open_clip=is_open)),
    ]


def ldm(width: int, context: int, channels: int = 4) -> dict[str, Tensor]:
    """A checkpoint with all its names, and as much of its shapes as tells what it is."""
    base = BASES.get((width, context))
    small = {name: torch.zeros(1) for name in (whole_names(base) if base else ())}
    keys = [name for name in small if name.endswith("attn2.to_k.weight")]
    keys = keys or [f"{LDM_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
    return {**small, **{name: torch.zeros(1, context) for name in keys}, LDM_FIRST: torch.zeros(width, channels, 3, 3)}


def whole_shapes(base: str) -> dict[str, tuple[int, ...]]:
    """UNet and VAE as diffusers' modules have them, with the names of the original implementation."""
    recipe = shipped(base)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(recipe.unet)).state_dict()
        vae = AutoencoderKL.from_config(dict(recipe.vae)).state_dict()
    attends = ["CrossAttn" in kind for kind in recipe.unet["up_block_types"]]
    layers, blocks = recipe.unet["layers_per_block"], len(recipe.vae["block_out_channels"])
    return {
        **{f"{LDM_UNET}{_unet_name(name, layers, attends)}": tuple(each.shape) for name, each in unet.items()},
        **{f"first_stage_model.{_vae_name(name, blocks)}": tuple(each.shape) for name, each in vae.items()},
    }


def write_header(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], bytes]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A safetensors file of these dtypes and shapes, with the bytes where they are given and holes elsewhere."""
    rows: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, written = 0, list[tuple[int, bytes]]()
    for name, (dtype, shape, *content) in tensors.items():
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        written += [(at, content[0])] if content else []
        at += size
    header = json.dumps(rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
        for place, data in written:
            file.seek(8 + len(header) + place)
            file.write(data)
    return path


def as_rows(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For `write_header`: as float16, without contents."""
    return {name: ("F16", tuple(tensor.shape)) for name, tensor in tensors.items()}


def without(tensors: Mapping[str, Any], *heads: str) -> dict[str, Any]:
    return {name: each for name, each in tensors.items() if not name.startswith(heads)}


def reasons(printed: str) -> Iterator[str]:
    """Why files were passed over, from what was logged."""
    for line in printed.splitlines():
        if "model_skipped" in line:
            yield line
