"""Patches LoRAs into modules: the sum of their deltas on private copies of the weights; the original weights stay.

Formulas as in kohya-ss/sd-scripts and KohakuBlueleaf/LyCORIS.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.diffusion.models.device import shallow_copy_module
from services.diffusion.models.entries import LoraEntry
from services.diffusion.models.faults import CONTENT_ERRORS, UnusableModel, is_of_device, part_of
from services.diffusion.models.lora_files import LoraLayer, LoraWeights, plain_name, unmatched

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


def patch_loras(module: Any, part: str, strengths: Sequence[LoraStrength], checkpoint_id: str) -> PatchedModule:
    """UnusableModel where a LoRA has layers that the module lacks, or of another shape."""
    names = layer_names(module)
    work: dict[str, list[tuple[LoraStrength, LoraLayer]]] = {}
    for each in strengths:
        for name, layer in each.lora.layers.get(part, {}).items():
            if name not in names:
                raise unmatched(each.lora, names, part, checkpoint_id).of_part(part_of(each.lora.entry))
            work.setdefault(names[name], []).append((each, layer))
    modules = dict(module.named_modules())
    copies: dict[str, Tensor] = {}
    for path, layers in work.items():
        try:
            copies.update(_copies(path, modules[path], layers))
        except CONTENT_ERRORS as error:
            # The device's fault is not the LoRA's.
            if is_of_device(error):
                raise
            lora = _misfit(path, modules[path], layers)
            raise UnusableModel(f"LoRA {lora.id} does not fit {checkpoint_id} at {path}", field="loras").of_part(
                part_of(lora)
            ) from error
    copy = shallow_copy_module(module, lambda name, tensor: copies.get(name, tensor))
    return PatchedModule(module=copy, size_bytes=sum(tensor.nbytes for tensor in copies.values()))


def _misfit(path: str, module: Any, layers: Sequence[tuple[LoraStrength, LoraLayer]]) -> LoraEntry:
    """Which of several LoRAs cannot be applied to the module."""
    for pair in layers[:-1]:
        try:
            _copies(path, module, [pair])
        except CONTENT_ERRORS:
            return pair[0].lora.entry
    return layers[-1][0].lora.entry


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


def _copies(path: str, module: Any, uses: Sequence[tuple[LoraStrength, LoraLayer]]) -> dict[str, Tensor]:
    """Private copies of the module's tensors with the layers' deltas added, in float32 until they are whole."""
    copies = {}
    layers = [(layer, use.strength) for use, layer in uses]
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


Pieces = dict[str, Tensor]


def add_delta(total: Tensor, weight: Tensor, layer: LoraLayer, strength: float) -> None:
    """`total` += strength * delta, in place; ValueError where the shapes do not fit.

    `total`: float32 (O, I) or (O, I, K, K); `weight`: the original one, of the same shape. LoRA as in Hu et al.
    2021, LoHa and LoKr as in LyCORIS, DoRA as in Liu et al. 2024.
    """
    # Moved in the file's type, which is half the bytes, and converted to float32 on the device.
    pieces = {name: tensor.to(total.device).to(total.dtype) for name, tensor in layer.tensors.items()}
    if "magnitude" in pieces:
        total.add_(
            _decomposed(weight.to(total.dtype), _delta(pieces, layer, weight.shape), pieces["magnitude"]),
            alpha=strength,
        )
    elif _is_plain(pieces):
        up, down = pieces["up"].flatten(1), pieces["down"].flatten(1)
        flat = total.view(total.shape[0], -1)
        if (up.shape[0], down.shape[1]) != flat.shape:
            raise ValueError(f"{layer.name} is for a weight of another shape")
        flat.addmm_(up, down, alpha=strength * _scale(pieces, layer, up.shape[1]))
    else:
        total.add_(_delta(pieces, layer, weight.shape), alpha=strength)


def bias_delta(layer: LoraLayer) -> Tensor | None:
    """What the layer adds to the bias, (O,); None for most layers."""
    return layer.tensors.get("diff_b")


def _is_plain(pieces: Pieces) -> bool:
    """A product of two matrices: a convolution's `up` must be 1 x 1."""
    return "up" in pieces and "mid" not in pieces and pieces["up"][0, 0].numel() == 1


def _delta(pieces: Pieces, layer: LoraLayer, shape: torch.Size) -> Tensor:
    if "up" in pieces:
        delta, rank = _locon(pieces), pieces["down"].shape[0]
    elif "hada_w1_a" in pieces:
        delta, rank = _loha(pieces), pieces["hada_w1_b"].shape[0]
    elif "lokr_w1" in pieces or "lokr_w1_a" in pieces:
        delta, rank = _lokr(pieces)
    elif "diff" in pieces:
        delta, rank = pieces["diff"], 0
    else:
        raise ValueError(f"{layer.name} lacks a part")
    if delta.numel() != shape.numel():
        raise ValueError(f"{layer.name} is for a weight of another shape")
    return delta.reshape(shape) * _scale(pieces, layer, rank)


def _scale(pieces: Pieces, layer: LoraLayer, rank: int) -> float:
    """alpha / rank; 1 without an alpha. `rank` 0: the delta is whole, and alpha has no meaning."""
    alpha = float(pieces["alpha"]) if "alpha" in pieces else layer.alpha
    return 1.0 if alpha is None or not rank else alpha / rank


def _locon(pieces: Pieces) -> Tensor:
    up, down = pieces["up"], pieces["down"]
    if "mid" in pieces:
        return torch.einsum("nmkl,in,mj->ijkl", pieces["mid"], up.flatten(1), down.flatten(1))
    return up.flatten(1) @ down.flatten(1)


def _loha(pieces: Pieces) -> Tensor:
    return _half(pieces, "hada_w1", "hada_t1") * _half(pieces, "hada_w2", "hada_t2")


def _half(pieces: Pieces, name: str, core: str) -> Tensor:
    a, b = pieces[f"{name}_a"], pieces[f"{name}_b"]
    if core in pieces:
        return _tucker(pieces[core], a, b)
    return a @ b


def _lokr(pieces: Pieces) -> tuple[Tensor, int]:
    """The Kronecker product of two matrices, each whole or of low rank, and the rank: 0 where both are whole."""
    rank = 0
    if "lokr_w1" in pieces:
        one = pieces["lokr_w1"]
    else:
        one, rank = pieces["lokr_w1_a"] @ pieces["lokr_w1_b"], pieces["lokr_w1_b"].shape[0]
    if "lokr_w2" in pieces:
        two = pieces["lokr_w2"]
    elif "lokr_t2" in pieces:
        two, rank = _tucker(pieces["lokr_t2"], pieces["lokr_w2_a"], pieces["lokr_w2_b"]), pieces["lokr_w2_b"].shape[0]
    else:
        two, rank = pieces["lokr_w2_a"] @ pieces["lokr_w2_b"].flatten(1), pieces["lokr_w2_b"].shape[0]
    one = one.reshape(*one.shape, *(1,) * (two.dim() - one.dim()))
    return torch.kron(one, two.contiguous()), rank


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (Liu et al. 2024): the patched weight's direction with a trained length, minus the weight.

    Lengths are of columns (LyCORIS: one a number of inputs) or of rows (PEFT: one a number of outputs).
    """
    merged = weight + delta
    is_of_rows = magnitude.numel() == weight.shape[0] and magnitude.shape[:1] != (1,)
    axis = 0 if is_of_rows else 1
    lengths = merged.transpose(0, axis).flatten(1).norm(dim=1)
    if lengths.numel() != magnitude.numel():
        raise ValueError("the magnitudes are for a weight of another shape")
    shape = [1] * weight.dim()
    shape[axis] = -1
    difference: Tensor = merged * (magnitude.flatten() / lengths).view(shape) - weight
    return difference
