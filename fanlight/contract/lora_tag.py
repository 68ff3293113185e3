"""What stands between `<lora:` and `>`: a LoRA's name and its weights, as A1111 reads them.

`name:weight`, `name:text encoder weight:UNet weight`, and the two by their names, `te=` and `unet=`, which come before
those without one (extensions-builtin/Lora/extra_networks_lora.py).
"""

import math
from dataclasses import dataclass

from fanlight.contract.limits import DEFAULT_LORA_WEIGHT, LORA_WEIGHT_LIMIT, format_number

TEXT_WEIGHT, UNET_WEIGHT = "te", "unet"
# A1111's third number without a name is its `dyn`.
_POSITIONS_LIMIT = 2
_SHOWN = 40


class BadLoraTag(ValueError):
    """The message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTagContent:
    name: str
    unet_weight: float
    text_weight: float
    # What A1111 or an extension may do something with and Fanlight does not, such as `dyn=8` or `lbw=ALL`.
    unused: tuple[str, ...] = ()


def read_lora_tag(inner: str) -> LoraTagContent:
    """BadLoraTag for what is no LoRA's name and weights. `inner`: without `<lora:` and `>`."""
    name, *given = inner.split(":")
    numbers, named, unused = list[float](), dict[str, float](), list[str]()
    for each in given:
        key, is_named, value = each.partition("=")
        if not is_named and len(numbers) < _POSITIONS_LIMIT:
            numbers.append(_weight(each))
        elif is_named and key.strip() in (TEXT_WEIGHT, UNET_WEIGHT):
            named[key.strip()] = _weight(value)
        else:
            unused.append(each.strip()[:_SHOWN])
    if not name.strip():
        raise BadLoraTag("is not '<lora:name:weight>' or '<lora:name:text encoder weight:UNet weight>'")
    text = named.get(TEXT_WEIGHT, numbers[0] if numbers else DEFAULT_LORA_WEIGHT)
    unet = named.get(UNET_WEIGHT, numbers[1] if len(numbers) > 1 else text)
    return LoraTagContent(name=name.strip(), unet_weight=unet, text_weight=text, unused=tuple(unused))


def lora_tag(name: str, *, unet_weight: float, text_weight: float) -> str:
    """The tag that is read as these."""
    weights = [unet_weight] if unet_weight == text_weight else [text_weight, unet_weight]
    return f"<lora:{name}:{':'.join(f'{weight:g}' for weight in weights)}>"


def _weight(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise BadLoraTag(f"{text.strip()[:_SHOWN]!r} is not a weight such as 1.2") from error
    if not math.isfinite(number) or abs(number) > LORA_WEIGHT_LIMIT:
        raise BadLoraTag(
            f"the weight is {format_number(number)}; must be {-LORA_WEIGHT_LIMIT:g} to {LORA_WEIGHT_LIMIT:g}"
        )
    return number
