"""What one layer of a LoRA adds to a weight. Formulas as in kohya-ss/sd-scripts and KohakuBlueleaf/LyCORIS."""

import torch
from torch import Tensor

from services.diffusion.models.loras import Layer

Pieces = dict[str, Tensor]


def add_delta(total: Tensor, weight: Tensor, layer: Layer, strength: float) -> None:
    """`total` += strength * delta, in place. `weight` is the pristine one. ValueError where the shapes do not fit."""
    # To the device as they are in the file, which is half the bytes, and there to float32.
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


def bias_delta(layer: Layer) -> Tensor | None:
    return layer.tensors.get("diff_b")


def _is_plain(pieces: Pieces) -> bool:
    """A product of two matrices; a convolution's `up` may be one of 1 x 1 only."""
    return "up" in pieces and "mid" not in pieces and pieces["up"][0, 0].numel() == 1


def _delta(pieces: Pieces, layer: Layer, shape: torch.Size) -> Tensor:
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


def _scale(pieces: Pieces, layer: Layer, rank: int) -> float:
    """alpha / rank; 1 where neither is told. `rank` 0: the delta is given whole, and alpha means nothing."""
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
    """The Kronecker product of two, each whole or itself of low rank, and the rank: 0 where both are whole."""
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
    """DoRA (Liu et al. 2024): the patched weight's direction with a trained length, less the weight.

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
