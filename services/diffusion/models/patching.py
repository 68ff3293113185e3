"""Modules with LoRAs in them: the sum of their deltas on private copies of the weights; the pristine ones stay."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fanlight.errors import FailedPrecondition
from services.diffusion.models.deltas import add_delta, bias_delta
from services.diffusion.models.loras import Layer, Lora, plain_name, unmatched
from services.diffusion.models.shadow import doubled
from services.diffusion.models.shortage import is_shortage

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Dose:
    """A LoRA and how strongly it is applied to the module at hand."""

    lora: Lora
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Patched:
    module: Any
    # Of the private copies alone.
    size_bytes: int


def patched(module: Any, part: str, doses: Sequence[Dose], checkpoint_id: str) -> Patched:
    """FailedPrecondition where a LoRA has layers that the module lacks, or of another shape."""
    names = layer_names(module)
    work: dict[str, list[tuple[Layer, float]]] = {}
    for dose in doses:
        for name, layer in dose.lora.layers.get(part, {}).items():
            if name not in names:
                raise unmatched(dose.lora, names, part, checkpoint_id)
            work.setdefault(names[name], []).append((layer, dose.strength))
    modules = dict(module.named_modules())
    copies: dict[str, Tensor] = {}
    for path, layers in work.items():
        try:
            copies.update(_copies(path, modules[path], layers))
        except torch.AcceleratorError:
            # The device's fault, which is told from the LoRA's above.
            raise
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            if is_shortage(error):
                raise
            ids = " and ".join(dose.lora.entry.id for dose in doses)
            raise FailedPrecondition(f"LoRA {ids} does not fit {checkpoint_id} at {path}", field="loras") from error
    double = doubled(module, lambda name, tensor: copies.get(name, tensor))
    return Patched(module=double, size_bytes=sum(tensor.nbytes for tensor in copies.values()))


def layer_names(module: Any) -> Mapping[str, str]:
    """From the names that LoRAs may have for a layer, as `plain_name` writes them, to its path in the module."""
    paths = [path for path, each in module.named_modules() if isinstance(getattr(each, "weight", None), nn.Parameter)]
    names = {plain_name(path): path for path in paths}
    layers = getattr(module.config, "layers_per_block", None)
    if isinstance(layers, int):
        ldm = {plain_name(name): path for path in paths for name in ldm_names(path, layers)}
        return {**ldm, **names}
    return names


def ldm_names(path: str, layers: int) -> Sequence[str]:
    """What the LDM layout calls a UNet's layer; none where it has no such."""
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


def _copies(path: str, module: Any, layers: Sequence[tuple[Layer, float]]) -> dict[str, Tensor]:
    """Private copies of the module's tensors with the layers' deltas added, in float32 until they are whole."""
    copies = {}
    weighing = [(layer, strength) for layer, strength in layers if set(layer.tensors) - {"diff_b", "alpha"}]
    if weighing:
        total = module.weight.to(torch.float32, copy=True)
        for layer, strength in weighing:
            add_delta(total, module.weight, layer, strength)
        copies[f"{path}.weight"] = total.to(module.weight.dtype)
    biased = [(delta, strength) for layer, strength in layers if (delta := bias_delta(layer)) is not None]
    if biased and module.bias is None:
        raise ValueError("the layer has no bias")
    if biased:
        total = module.bias.to(torch.float32, copy=True)
        for delta, strength in biased:
            total.add_(delta.to(total.device, total.dtype), alpha=strength)
        copies[f"{path}.bias"] = total.to(module.bias.dtype)
    return copies
