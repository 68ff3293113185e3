"""What a LoRA's layer adds to a weight and a bias, for every form that is applied. Knows no files and no models.

Formulas as in kohya-ss/sd-scripts, KohakuBlueleaf/LyCORIS and huggingface/peft. Of all forms a strength scales the
whole difference that the layer makes at strength 1, as A1111 does; LyCORIS scales some of them on the inside.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from services.diffusion.models.peft_config import PeftScale

Pieces = Mapping[str, Tensor]
_NUMBERS = frozenset({"alpha", "scale", "scalar", "on_input"})
OF_BIAS = frozenset({"diff_b", "up_bias", "whole_bias"})
# A layer has one.
_FORMS = (
    frozenset({"up", "down", "mid"}),
    frozenset({"token_up", "token_down"}),
    frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    frozenset({"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"}),
    frozenset({"diff"}),
    frozenset({"whole_weight"}),
    frozenset({"glora_a1", "glora_a2", "glora_b1", "glora_b2"}),
    frozenset({"oft_blocks", "oft_rotations"}),
    frozenset({"ia3_scale"}),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraLayer:
    """A LoRA's tensors for one module, by what each is (lora_names); for a LoRA `down` (r, in) and `up` (out, r)."""

    # Its name in the file.
    name: str
    tensors: Pieces
    # Where PEFT's configuration says it.
    peft: PeftScale | None = None

    @property
    def changes_weight(self) -> bool:
        return bool(self.tensors.keys() - OF_BIAS - _NUMBERS)

    @property
    def changes_bias(self) -> bool:
        """PEFT's IA3 also scales the bias, unless its vector is for the inputs."""
        return bool(self.tensors.keys() & OF_BIAS) or "ia3_scale" in self.tensors


def add_delta(total: Tensor, weight: Tensor, layer: LoraLayer, strength: float) -> None:
    """`total` += strength * delta, in place; ValueError, and nothing added, where the layer does not fit.

    `total`: float32 (O, I) or (O, I, K, K); `weight`: the original one, of the same shape.
    """
    # Moved in the file's type, which is half the bytes, and converted to float32 on the device.
    pieces = {
        name: tensor.to(total.device).to(total.dtype) for name, tensor in layer.tensors.items() if name not in OF_BIAS
    }
    if sum(bool(pieces.keys() & form) for form in _FORMS) > 1:
        raise ValueError(f"{layer.name} has tensors of two forms")
    magnitude = "row_magnitude" if "row_magnitude" in pieces else "magnitude"
    if magnitude in pieces:
        merged = weight.to(total.dtype) + _delta(pieces, layer, weight)
        total.add_(_decomposed(weight.to(total.dtype), merged, pieces, magnitude), alpha=strength)
    elif _is_plain(pieces) and _columns(pieces) == weight[0].numel():
        up, down = pieces["up"].flatten(1), pieces["down"].flatten(1)
        if up.shape != (weight.shape[0], down.shape[0]):
            raise ValueError(f"{layer.name} is for a weight of another shape")
        factor = strength * _factor(pieces, layer, down.shape[0])
        total.view(total.shape[0], -1).addmm_(up, down, alpha=factor)
    else:
        total.add_(_delta(pieces, layer, weight), alpha=strength)


def add_bias(total: Tensor, bias: Tensor, layer: LoraLayer, strength: float) -> None:
    """`total` += strength * delta, in place; ValueError where it does not fit. Both (O,); `total`: float32."""
    pieces = {name: tensor.to(total.device).to(total.dtype) for name, tensor in layer.tensors.items()}
    if "whole_bias" in pieces:
        delta = pieces["whole_bias"] - bias.to(total.dtype)
    elif "up_bias" in pieces:
        delta = pieces["up_bias"] * _factor(pieces, layer, _rank(pieces))
    elif "diff_b" in pieces:
        delta = pieces["diff_b"]
    elif not _scales_inputs(pieces, layer, total.shape[0]):
        delta = (pieces["ia3_scale"].flatten() - 1) * bias.to(total.dtype)
    else:
        return
    if delta.shape != total.shape:
        raise ValueError(f"{layer.name} is for a bias of another shape")
    total.add_(delta, alpha=strength)


def _is_plain(pieces: Pieces) -> bool:
    """A product of two matrices: a convolution's `up` must be 1 x 1."""
    return (
        "up" in pieces
        and "down" in pieces
        and not pieces.keys() & {"mid", "scalar"}
        and pieces["up"].dim() >= 2
        and pieces["up"].shape[2:].numel() == 1
    )


def _columns(pieces: Pieces) -> int:
    return pieces["down"].shape[1:].numel()


def _rank(pieces: Pieces) -> int:
    return pieces["down"].shape[0] if "down" in pieces else 0


def _delta(pieces: Pieces, layer: LoraLayer, weight: Tensor) -> Tensor:
    """Of the weight's shape, scaled."""
    made, rank = _product(pieces, layer, weight)
    factor = _factor(pieces, layer, rank)
    if "scalar" in pieces:
        factor *= _number(pieces["scalar"])
    return _shaped(made, layer, weight.shape) * factor


def _shaped(made: Tensor, layer: LoraLayer, shape: torch.Size) -> Tensor:
    """For a UNet made for inpainting, zeros for mask and masked image, which come after the latents' channels."""
    if made.shape[:1] != shape[:1]:
        raise ValueError(f"{layer.name} is for another number of outputs")
    if made.numel() == shape.numel():
        return made.reshape(shape)
    channels, left = divmod(made.numel(), shape[0] * shape[2:].numel())
    if len(shape) == 4 and not left and shape[1] == 2 * channels + 1:
        return pad(made.reshape(shape[0], channels, *shape[2:]), (0, 0, 0, 0, 0, channels + 1))
    raise ValueError(f"{layer.name} is for a weight of another shape")


def _product(pieces: Pieces, layer: LoraLayer, weight: Tensor) -> tuple[Tensor, int]:
    """Not scaled, and the rank; 0 where what alpha is divided by is unknown, or alpha means something else."""
    limit = weight.numel()
    if "up" in pieces and "down" in pieces:
        return _locon(pieces, limit), _rank(pieces)
    if "token_up" in pieces and "token_down" in pieces:
        return _matrix(pieces["token_up"], pieces["token_down"], limit).t(), pieces["token_down"].shape[0]
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= pieces.keys():
        return _loha(pieces, limit), pieces["hada_w1_b"].shape[0]
    if any(name.startswith("lokr_") for name in pieces):
        return _lokr(pieces, limit)
    if "diff" in pieces:
        return pieces["diff"], 0
    own = weight.to(torch.float32)
    if "whole_weight" in pieces and "on_input" not in pieces:
        return _same_size(pieces["whole_weight"], own) - own, 0
    if {"glora_a1", "glora_a2", "glora_b1", "glora_b2"} <= pieces.keys():
        return _glora(pieces, own)
    if "oft_blocks" in pieces or "oft_rotations" in pieces:
        return _oft(pieces, own), 0
    if "ia3_scale" in pieces or "on_input" in pieces:
        return _ia3(pieces, layer, own), 0
    raise ValueError(f"{layer.name} lacks a part")


def _factor(pieces: Pieces, layer: LoraLayer, rank: int) -> float:
    """alpha / rank; 1 without an alpha."""
    if "scale" in pieces:
        return _number(pieces["scale"])
    if "alpha" in pieces:
        return _number(pieces["alpha"]) / rank if rank else 1.0
    is_lokr = any(name.startswith("lokr_") for name in pieces)
    if layer.peft is None or not (rank or is_lokr):
        return 1.0
    return layer.peft.factor(layer.peft.rank if is_lokr else rank)


def _number(tensor: Tensor) -> float:
    """Of shape () or (1,); ValueError for another, or for what is not finite."""
    number = float(tensor)
    if not math.isfinite(number):
        raise ValueError("an alpha is not finite")
    return number


def _matrix(one: Tensor, other: Tensor, limit: int) -> Tensor:
    """The product (O, I) of (O, R) and (R, ...), flattened; never of more numbers than the limit."""
    rows, columns = one.flatten(1), other.flatten(1)
    _bounded(rows.shape[0] * columns.shape[1], limit)
    return rows @ columns


def _bounded(numbers: int, limit: int) -> None:
    """Before it is computed: a small file can ask for more memory than there is."""
    if numbers > limit:
        raise ValueError("it is for a larger weight")


def _same_size(tensor: Tensor, own: Tensor) -> Tensor:
    if tensor.numel() != own.numel():
        raise ValueError("it is for a weight of another shape")
    return tensor.reshape(own.shape)


def _locon(pieces: Pieces, limit: int) -> Tensor:
    """A convolution without a middle may be larger in either factor, of which the other is 1 x 1."""
    up, down = pieces["up"], pieces["down"]
    if "mid" in pieces:
        mid = pieces["mid"]
        _bounded(up.shape[0] * down.shape[1] * mid.shape[2:].numel(), limit)
        return torch.einsum("nmkl,in,mj->ijkl", mid, up.flatten(1), down.flatten(1))
    return _matrix(up, down, limit)


def _loha(pieces: Pieces, limit: int) -> Tensor:
    return _half(pieces, "hada_w1", "hada_t1", limit) * _half(pieces, "hada_w2", "hada_t2", limit)


def _half(pieces: Pieces, name: str, core: str, limit: int) -> Tensor:
    a, b = pieces[f"{name}_a"], pieces[f"{name}_b"]
    return _tucker(pieces[core], a, b, limit) if core in pieces else _matrix(a, b, limit)


def _tucker(core: Tensor, a: Tensor, b: Tensor, limit: int) -> Tensor:
    _bounded(a.shape[1] * b.shape[1] * core.shape[2:].numel(), limit)
    return torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _lokr(pieces: Pieces, limit: int) -> tuple[Tensor, int]:
    """The Kronecker product of two matrices, each whole or of low rank, and the rank: 0 where both are whole."""
    rank = 0
    if "lokr_w1" in pieces:
        one = pieces["lokr_w1"]
    else:
        one, rank = _matrix(pieces["lokr_w1_a"], pieces["lokr_w1_b"], limit), pieces["lokr_w1_b"].shape[0]
    if "lokr_w2" in pieces:
        two = pieces["lokr_w2"]
    else:
        a, b = pieces["lokr_w2_a"], pieces["lokr_w2_b"]
        rank = b.shape[0]
        two = _tucker(pieces["lokr_t2"], a, b, limit) if "lokr_t2" in pieces else _matrix(a, b, limit)
    _bounded(one.numel() * two.numel(), limit)
    one = one.reshape(*one.shape, *(1,) * (two.dim() - one.dim()))
    return torch.kron(one, two.contiguous()), rank


def _glora(pieces: Pieces, own: Tensor) -> tuple[Tensor, int]:
    """W A + B of low ranks (Chavan et al. 2023), for `own` (O, I, ...); old files of LyCORIS swap the factors."""
    a1, a2, b1, b2 = (pieces[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[0] != own.shape[1] or b1.shape[0] != own.shape[0] or a2.shape[0] != a1.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = a2.shape[0]
    if "glora_bm" in pieces:
        middle = {"up": b1, "mid": pieces["glora_bm"], "down": b2}
        added = _locon(middle, own.numel())
    else:
        added = _matrix(b1, b2, own.numel())
    changed = torch.einsum("oi...,ij,jk->ok...", own, a1, a2)
    return _same_size(added, own) + _same_size(changed, own), rank


def _oft(pieces: Pieces, own: Tensor) -> Tensor:
    """Blocks of outputs turned by orthogonal matrices (Qiu et al. 2023), or by several in turn (BOFT, Liu et al. 2024).

    `alpha` is the constraint, as a part of the outputs; 0 and none: no constraint.
    """
    if "oft_rotations" in pieces:
        turned = _turned(own, pieces["oft_rotations"])
    else:
        blocks = pieces["oft_blocks"]
        rotations = _rotations(blocks, _number(pieces["alpha"]) * own.shape[0] if "alpha" in pieces else 0.0)
        turned = _turned(own, rotations) if blocks.dim() == 3 else _butterfly(own, rotations)
    if "rescale" in pieces:
        turned = turned * pieces["rescale"].reshape(-1, *(1,) * (own.dim() - 1))
    return turned - own


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    """Cayley's map of what is skew in the blocks (..., b, b), which is made no longer than the constraint."""
    if blocks.dim() not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError("its blocks are not square")
    skew = blocks - blocks.transpose(-1, -2)
    length = float(skew.norm()) + 1e-8
    if 0 < constraint < length:
        skew = skew * (constraint / length)
    one = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations: Tensor = (one + skew) @ torch.linalg.inv(one - skew)
    return rotations


def _turned(own: Tensor, rotations: Tensor) -> Tensor:
    """(O, ...) in blocks, each turned by the transpose of its rotation (k, b, b)."""
    count, size, _ = rotations.shape
    if count * size != own.shape[0]:
        raise ValueError("its blocks are for another number of outputs")
    turned: Tensor = torch.einsum("knm,kn...->km...", rotations, own.reshape(count, size, *own.shape[1:]))
    return turned.reshape(own.shape)


def _butterfly(own: Tensor, rotations: Tensor) -> Tensor:
    """(O, ...) turned in as many ways as there are (m, k, b, b): blocks of neighbors, then of ever farther rows."""
    ways, count, size, _ = rotations.shape
    if count * size != own.shape[0] or size % 2 or own.shape[0] % (2 ** (ways - 1) * size):
        raise ValueError("its blocks are for another number of outputs")
    rows = own.flatten(1)
    for way in range(ways):
        distance = 2**way * (size // 2)
        # Row c, g, k becomes row c, k, g.
        mixed = rows.reshape(-1, 2, distance, rows.shape[1]).transpose(1, 2).reshape(count, size, -1)
        turned = torch.einsum("kij,kjn->kin", rotations[way], mixed)
        rows = turned.reshape(-1, distance, 2, rows.shape[1]).transpose(1, 2).reshape(own.shape[0], -1)
    return rows.reshape(own.shape)


def _ia3(pieces: Pieces, layer: LoraLayer, own: Tensor) -> Tensor:
    """Rows or columns of the weight scaled by a vector (Liu et al. 2022); LyCORIS stores what is added to 1."""
    is_on_input = _scales_inputs(pieces, layer, own.shape[0])
    vector = pieces["ia3_scale"].flatten() - 1 if "ia3_scale" in pieces else pieces["whole_weight"].flatten()
    if len(vector) != own.shape[1 if is_on_input else 0]:
        raise ValueError(f"{layer.name} is for a weight of another shape")
    shape = [1] * own.dim()
    shape[1 if is_on_input else 0] = -1
    return own * vector.view(shape)


def _scales_inputs(pieces: Pieces, layer: LoraLayer, outputs: int) -> bool:
    """PEFT's vectors are (out, 1) or (1, in); of a convolution (1, N, 1, 1), where its configuration decides."""
    if "on_input" in pieces:
        return bool(pieces["on_input"])
    shape = pieces["ia3_scale"].shape
    if len(shape) == 2:
        return shape[0] == 1 and shape[1] != 1
    return layer.peft.is_feedforward if layer.peft is not None else shape[1] != outputs


def _decomposed(weight: Tensor, merged: Tensor, pieces: Pieces, magnitude: str) -> Tensor:
    """DoRA (Liu et al. 2024): the patched weight's direction with a trained length, minus the weight.

    Lengths are of rows, one for each output, in PEFT. In LyCORIS they are of columns, one for each input, unless their
    shape is (O, 1).
    """
    lengths = pieces[magnitude]
    is_of_rows = magnitude == "row_magnitude" or (lengths.numel() == weight.shape[0] and lengths.shape[:1] != (1,))
    axis = 0 if is_of_rows else 1
    own = merged.transpose(0, axis).flatten(1).norm(dim=1)
    if own.numel() != lengths.numel():
        raise ValueError("the magnitudes are for a weight of another shape")
    shape = [1] * weight.dim()
    shape[axis] = -1
    difference: Tensor = merged * (lengths.flatten() / own).view(shape) - weight
    return difference
