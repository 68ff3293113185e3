"""Patches LoRAs into modules: the sum of their deltas on private copies of the weights; the original weights stay."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.diffusion.models.device import shallow_copy_module
from services.diffusion.models.entries import LoraEntry
from services.diffusion.models.faults import CONTENT_ERRORS, is_of_device
from services.diffusion.models.lora_files import LoraWeights
from services.diffusion.models.lora_forms import OF_BIAS, LoraLayer, add_bias, add_delta
from services.diffusion.models.lora_names import plain_name

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}

_LDM_TOPS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraStrength:
    """A LoRA and how strongly it is applied to a module."""

    lora: LoraWeights
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchedModule:
    """A shallow copy of a module, with its own tensors where LoRAs change them."""

    module: Any
    # Of its own tensors alone.
    size_bytes: int
    # By LoRA, the names of the layers that the module lacks, or that do not fit its own.
    left_out: Mapping[LoraEntry, Sequence[str]]


_Use = tuple[LoraStrength, LoraLayer]


def patch_loras(module: Any, part: str, strengths: Sequence[LoraStrength]) -> PatchedModule:
    """With each layer that fits: those that do not are left out."""
    work, left_out = _placed(layer_names(module), part, strengths)
    modules = dict(module.named_modules())
    copies: dict[str, Tensor] = {}
    for path, uses in work.items():
        made, unfit = _copies(path, modules[path], uses)
        copies.update(made)
        for each, layer in unfit:
            left_out[each.lora.entry].append(layer.name)
    copy = shallow_copy_module(module, lambda name, tensor: copies.get(name, tensor))
    for path in work:
        _add_bias_parameter(copy.get_submodule(path), copies.get(f"{path}.bias"))
    return PatchedModule(
        module=copy, size_bytes=sum(tensor.nbytes for tensor in copies.values()), left_out=dict(left_out)
    )


def _placed(
    names: Mapping[str, str], part: str, strengths: Sequence[LoraStrength]
) -> tuple[dict[str, list[_Use]], dict[LoraEntry, list[str]]]:
    """The layers by the path of what they are for, and those that are for nothing here."""
    work: dict[str, list[_Use]] = defaultdict(list)
    left_out: dict[LoraEntry, list[str]] = defaultdict(list)
    for each in strengths:
        for name, layer in each.lora.layers.get(part, {}).items():
            if path := names.get(name) or names.get(f"{name}_0" if name.endswith("to_out") else ""):
                work[path].append((each, layer))
            else:
                left_out[each.lora.entry].append(layer.name)
    return work, left_out


def _add_bias_parameter(module: Any, bias: Tensor | None) -> None:
    """To a layer of the copy that had none: as LyCORIS and PEFT do."""
    if bias is not None and getattr(module, "bias", bias) is None:
        module.bias = nn.Parameter(bias, requires_grad=False)


def layer_names(module: Any) -> Mapping[str, str]:
    """From each name that LoRAs may have for a layer, as `plain_name` writes it, to its path in the module."""
    paths = [path for path, each in module.named_modules() if isinstance(getattr(each, "weight", None), nn.Parameter)]
    names = {plain_name(path): path for path in paths}
    layers = getattr(module.config, "layers_per_block", None)
    if isinstance(layers, int):
        ldm = {plain_name(name): path for path in paths for name in ldm_names(path, layers)}
        return {**ldm, **names}
    return names


def ldm_names(path: str, layers: int) -> Sequence[str]:
    """The LDM layout's names of a UNet's layer; empty where it has none."""
    if path in _LDM_TOPS:
        return [_LDM_TOPS[path]]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        place = 2 * int(found[2]) if found[1] == "resnets" else 1
        return [f"middle_block.{place}.{_inner(found[1], found[3])}"]
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path):
        start = int(found[2]) * (layers + 1) + int(found[4])
        block = f"input_blocks.{start + 1}" if found[1] == "down" else f"output_blocks.{start}"
        return [f"{block}.{0 if found[3] == 'resnets' else 1}.{_inner(found[3], found[5])}"]
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", path):
        last = (int(found[2]) + 1) * (layers + 1)
        # An upsampler comes after the block's attention, where it has one.
        return (
            [f"input_blocks.{last}.0.op"]
            if found[1] == "down"
            else [f"output_blocks.{last - 1}.{place}.conv" for place in (1, 2)]
        )
    return []


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest


def _copies(path: str, module: Any, uses: Sequence[_Use]) -> tuple[dict[str, Tensor], list[_Use]]:
    """Private copies of the module's tensors with the layers' deltas added, in float32 until they are whole.

    And the uses of layers that do not fit, of which nothing is added.
    """
    copies = {}
    weight, unfit = _sum(module.weight, [use for use in uses if use[1].changes_weight], add_delta)
    if weight is not None:
        copies[f"{path}.weight"] = weight
    biased = [use for use in uses if use[1].changes_bias and not any(use is each for each in unfit)]
    if not hasattr(module, "bias"):
        return copies, [*unfit, *biased]
    own = module.bias
    if own is None:
        # What only scales a bias changes nothing then.
        biased = [use for use in biased if use[1].tensors.keys() & OF_BIAS]
        own = module.weight.new_zeros(module.weight.shape[0])
    bias, unfit_biases = _sum(own, biased, add_bias)
    if bias is not None:
        copies[f"{path}.bias"] = bias
    return copies, [*unfit, *unfit_biases]


def _sum(
    own: Tensor, uses: Sequence[_Use], add: Callable[[Tensor, Tensor, LoraLayer, float], None]
) -> tuple[Tensor | None, list[_Use]]:
    """The tensor with what the layers add to it, None where that is nothing; and the uses that do not fit."""
    if not uses:
        return None, []
    total, unfit = own.to(torch.float32, copy=True), []
    for use in uses:
        try:
            add(total, own, use[1], use[0].strength)
        except CONTENT_ERRORS as error:
            # The device's fault is not the LoRA's.
            if is_of_device(error):
                raise
            unfit.append(use)
    return (total.to(own.dtype) if len(unfit) < len(uses) else None), unfit
