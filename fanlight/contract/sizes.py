"""Sizes of images: what a model's sides must be, and classes of sizes that take about the same time."""

import math

from fanlight.contract.limits import DEFAULT_SIZE_STEP_PX, SIDE_MAX_PX, SIDE_MIN_PX
from fanlight.errors import InvalidField


def check_size(width_px: int, height_px: int, step_px: int = 0) -> None:
    """InvalidField, fields `width_px` and `height_px`, unless both are 0 or both 64 to 2048 and multiples of the step.

    `step_px`: what the model announces; 0 where it is unknown, and any step is taken.
    """
    if not width_px and not height_px:
        return
    for field, side_px in (("width_px", width_px), ("height_px", height_px)):
        if not side_px:
            raise InvalidField("is missing: give both sides or none", field=field)
        if not SIDE_MIN_PX <= side_px <= SIDE_MAX_PX or (step_px and side_px % step_px):
            step = f" and a multiple of {step_px}" if step_px else ""
            raise InvalidField(f"is {side_px}; must be {SIDE_MIN_PX} to {SIDE_MAX_PX}{step}", field=field)


def size_step_px(announced_px: int) -> int:
    """What sides must be multiples of, in pixels: as the model announces it, or 8 where it does not (0)."""
    return announced_px or DEFAULT_SIZE_STEP_PX


def size_class(width_px: int, height_px: int) -> int:
    """round(log2(width x height)), as queue.v1.StepTime counts sizes; 0 where a side is not known."""
    return round(math.log2(width_px * height_px)) if width_px and height_px else 0
