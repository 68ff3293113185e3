"""Weights in eight bits with scales beside them: which kinds are read, and the weights that they stand for.

`weight = stored x scale`, with one scale for the tensor or one for each output (`scale_weight`, `weight_scale`), as
ComfyUI and compressed-tensors write them. All other kinds are refused by name. Imports torch on use.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from services.diffusion.models.headers import SafetensorsHeader
from services.diffusion.models.recipes import UnfitFolder

if TYPE_CHECKING:
    import torch

_MARK = "scaled_fp8"
_FORMAT = ".comfy_quant"
# ComfyUI's formats whose weights are the stored numbers times a scale.
_PLAIN_FORMATS = frozenset({"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"})
_FORMAT_LIMIT_BYTES = 4_096
# Of the layer's input, for devices that multiply in eight bits: without them the product is the same, and exacter.
_INPUT_SCALES = (".scale_input", ".input_scale")
_OLD_SCALE = ".scale_weight"
_SCALE = "weight_scale"
_ENDINGS = (_OLD_SCALE, _SCALE, _FORMAT, *_INPUT_SCALES, f".{_MARK}")
# By how a tensor's name ends, the kinds that need more than a product.
_REFUSED = {
    "weight_scale_inv": "scales for blocks of a weight (weight_scale_inv)",
    "weight_scale_2": "two levels of scales (NVFP4)",
    "weight_zero_point": "zero points (weight_zero_point)",
    "weight.absmax": "bitsandbytes",
    "weight.quant_map": "bitsandbytes",
    "weight.SCB": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "GPTQ, AWQ or SVDQuant",
    ".qzeros": "GPTQ or AWQ",
}
_EIGHT_BITS = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
_PACKED = frozenset({"U8", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})


def is_scale(name: str) -> bool:
    """A tensor that says how others are stored, and is no weight itself."""
    return name.endswith(_ENDINGS) or name == _MARK


def _is_mark(name: str) -> bool:
    return name == _MARK or name.endswith(f".{_MARK}")


def _scaled(name: str) -> str:
    """The weight that a scale is for; empty for other names."""
    if name.endswith(_OLD_SCALE):
        return f"{name.removesuffix(_OLD_SCALE)}.weight"
    return name.removesuffix("_scale") if name.endswith(_SCALE) else ""


def check_quantized(header: SafetensorsHeader) -> None:
    """UnfitFolder where the weights are stored in a way that is not read here."""
    dtypes = header.dtypes()
    kinds = set(dtypes.values())
    if not kinds & (_EIGHT_BITS | _PACKED) and not any(map(is_scale, dtypes)):
        return
    scales = {weight for name in dtypes if (weight := _scaled(name))}
    for name, dtype in dtypes.items():
        _check_tensor(name, dtype, header.shapes, is_scaled=name in scales)
    marked = next((name for name in dtypes if _is_mark(name)), "")
    if marked and not scales and kinds & _EIGHT_BITS:
        raise UnfitFolder(f"it is marked {marked}, and has none of the scales that its weights need")


def _check_tensor(name: str, dtype: str, shapes: Mapping[str, tuple[int, ...]], *, is_scaled: bool) -> None:
    if ending := next((each for each in _REFUSED if name.endswith(each)), ""):
        raise UnfitFolder(f"its weights are stored with {_REFUSED[ending]}, which is not supported: it has {name[:80]}")
    if name.endswith(("weight", _SCALE)) and dtype in _PACKED:
        raise UnfitFolder(f"its weights are packed ({name[:80]} is {dtype}), which is not supported")
    if dtype == "I8" and name.endswith("weight") and not is_scaled:
        raise UnfitFolder(f"{name[:80]} is stored in whole numbers and has no scale")
    weight = _scaled(name)
    if weight in shapes and not _fits(shapes[name], shapes[weight]):
        raise UnfitFolder(
            f"{name[:80]} has the shape {list(shapes[name])}, which is neither one scale nor one for each output"
        )


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """One number, or one for each of the weight's first dimension."""
    return all(side == 1 for side in scale) or (
        bool(weight) and scale[0] == weight[0] and all(side == 1 for side in scale[1:])
    )


def dequantized(
    found: Mapping[str, "torch.Tensor"], dtype: "torch.dtype", reserve: Callable[[int], None]
) -> "dict[str, torch.Tensor]":
    """The weights that scaled ones stand for, in `dtype`, and the others as they are; without the scales.

    `found`: by name, a weight such as (O, I) with a scale (), (1,), (O,) or (O, 1). ValueError where a scale does not
    fit or is not finite. Raises as `reserve` does, before anything is copied.
    """
    scales = {weight: name for name in found if (weight := _scaled(name)) in found}
    plain = {name: tensor for name, tensor in found.items() if not is_scale(name) and name not in scales}
    for name, tensor in found.items():
        if name.endswith(_FORMAT):
            _check_format(name, tensor)
    reserve(sum(found[weight].numel() for weight in scales) * dtype.itemsize)
    return plain | {weight: _product(found[weight], found[name], name).to(dtype) for weight, name in scales.items()}


def _product(weight: "torch.Tensor", scale: "torch.Tensor", name: str) -> "torch.Tensor":
    """(O, ...) times a scale of one number or of (O,), in float32."""
    import torch

    if not _fits(tuple(scale.shape), tuple(weight.shape)):
        raise ValueError(f"{name} has the shape {tuple(scale.shape)}, its weight {tuple(weight.shape)}")
    wide = scale.float().reshape(-1, *[1] * (weight.dim() - 1)) if scale.numel() > 1 else scale.float().reshape(())
    if not bool(torch.isfinite(wide).all()):
        raise ValueError(f"{name} is not finite")
    return weight.float() * wide


def _check_format(name: str, tensor: "torch.Tensor") -> None:
    """ComfyUI's JSON of how a layer is stored, as bytes (N,)."""
    if tensor.numel() > _FORMAT_LIMIT_BYTES:
        raise ValueError(f"{name} is too large")
    told: Any = json.loads(bytes(tensor.flatten().tolist()))
    kind = told.get("format") if isinstance(told, dict) else None
    if kind not in _PLAIN_FORMATS or told.get("convrot"):
        raise ValueError(f"{name} says {str(told)[:80]}, which is not supported")
