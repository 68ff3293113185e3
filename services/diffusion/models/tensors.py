"""From files to the tensors of one part of a model, under the names that diffusers' and transformers' classes have.

Nothing is fetched, and of pickles nothing but tensors is taken. Nothing else in this service reads weights.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanlight.errors import FailedPrecondition
from services.diffusion.lean import lean_module
from services.diffusion.models.recipes import Config, TextRecipe
from services.weights.loading import load_checkpoint, load_safetensors

Tensors = dict[str, Tensor]

# Attention in VAEs that older programs wrote.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VARIANT = re.compile(r"[._](fp16|bf16|non_ema|ema)[._-]")
_FIRST_STAGE = "first_stage_model."


class NoWeights(FileNotFoundError):
    """The folder has no weights in it."""


def folder_tensors(folder: Path, name: str) -> Tensors:
    """Of one part's folder; fp16 only where nothing else is there. FailedPrecondition where there are only pickles."""
    files = sorted(folder.glob("*.safetensors"))
    whole = [file for file in files if not _VARIANT.search(file.name)]
    if not files and (any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))):
        raise FailedPrecondition(
            f"{name} has pickles only, which are not loaded; give it as safetensors", field="model"
        )
    if not files:
        raise NoWeights("no safetensors")
    chosen = whole or [file for file in files if ".fp16" in file.name] or files
    return {key: tensor for file in chosen for key, tensor in load_safetensors(file).items()}


def ldm_unet(path: Path, config: Config) -> Tensors:
    return _converted(
        _conversions().convert_ldm_unet_checkpoint, load_checkpoint(path, prefixes=("model.diffusion_model.",)), config
    )


def ldm_vae(path: Path, config: Config) -> Tensors:
    return _converted(
        _conversions().convert_ldm_vae_checkpoint, load_checkpoint(path, prefixes=(_FIRST_STAGE,)), config
    )


def ldm_text(path: Path, recipe: TextRecipe, model: Any) -> Tensors:
    """`model`: the text encoder that they are for, which tells how wide its layers are."""
    found = load_checkpoint(path, prefixes=("cond_stage_model.", "conditioner.embedders."))
    for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."):
        if recipe.part == "text_encoder" and any(name.startswith(prefix) for name in found):
            return text_tensors({n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)})
    for prefix in ("cond_stage_model.model.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model."):
        if any(name.startswith(prefix) for name in found):
            return text_tensors(_conversions().convert_open_clip_checkpoint(model, found, prefix=prefix))
    raise NoWeights("no text encoder")


def control_file(path: Path, config: Config) -> Tensors:
    found = load_safetensors(path)
    if any(name.startswith("controlnet_cond_embedding.") for name in found):
        return found
    return _converted(_conversions().convert_controlnet_checkpoint, found, config)


def vae_file(path: Path, config: Config) -> Tensors:
    """A VAE's own file, in diffusers' names or in the LDM layout's."""
    found = load_safetensors(path)
    if any(".mid_block." in name for name in found):
        return vae_tensors(found)
    return _converted(_conversions().convert_ldm_vae_checkpoint, found, config)


def tiny_vae_file(path: Path) -> Tensors:
    return load_safetensors(path)


def vae_tensors(found: Mapping[str, Tensor]) -> Tensors:
    """Under today's names."""
    return {_attention_name(name): tensor for name, tensor in found.items()}


def text_tensors(found: Mapping[str, Tensor]) -> Tensors:
    """`text_model.` stands before the names in some files."""
    return {name.removeprefix("text_model."): tensor for name, tensor in found.items()}


def _attention_name(name: str) -> str:
    if ".attentions." not in name:
        return name
    for old, new in _OLD_ATTENTION.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _conversions() -> Any:
    """From the LDM layout's names to diffusers'."""
    return lean_module("loaders.single_file_utils")


def _converted(convert: Any, found: Tensors, config: Config) -> Tensors:
    """diffusers' conversion, which takes what it converts out of its argument."""
    if not found:
        raise NoWeights("nothing of this part is in the file")
    converted: Mapping[str, Tensor] = convert(dict(found), dict(config))
    return {name: tensor for name, tensor in converted.items() if isinstance(tensor, torch.Tensor)}
