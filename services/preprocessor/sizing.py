"""How large a control image is, how a picture is made to fit, and at what size an annotator works. Pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from cv2.typing import MatLike

from fanlight.contract.parameters import Parameter, Value
from fanlight.errors import TooLarge
from services.kernel.pictures import PictureLimits

# Width and height in pixels.
Size: TypeAlias = tuple[int, int]

STRETCH, CROP, PAD = "stretch", "crop", "pad"
# Networks want sides that they can halve six times; controlnet_aux rounds to the same step.
STEP_PX = 64
# However large, or long and thin, a picture is, an annotator works on no more than this.
WORKING_PIXELS_MAX, WORKING_SIDE_MAX_PX = 4_194_304, 8_192
SIDE_MAX_PX = 32_766

SIZING = (
    Parameter(
        name="resize_mode",
        default=STRETCH,
        choices=(STRETCH, CROP, PAD),
        description="How a picture of another aspect fits a given width and height: stretched, cut, or bordered black",
    ),
    Parameter(
        name="short_side_px",
        default=0,
        minimum=0,
        maximum=SIDE_MAX_PX,
        description="Without a width and height: the control image's short side in pixels; 0 keeps the picture's size",
    ),
)


def working_resolution(default: int, *, in_steps: bool) -> Parameter:
    own = "the control image's own size" + (", rounded too" if in_steps else "")
    return Parameter(
        name="detect_resolution",
        default=default,
        minimum=0,
        maximum=4096,
        description=f"The short side at which it works, in pixels, rounded to {STEP_PX}; 0 is {own}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """`crop` is what of the picture is used: left, top, width, height. The map fills `inner`, centred in `outer`."""

    crop: tuple[int, int, int, int]
    inner: Size
    outer: Size

    @property
    def offset(self) -> Size:
        return (self.outer[0] - self.inner[0]) // 2, (self.outer[1] - self.inner[1]) // 2


def check_size(size: Size, limits: PictureLimits, *, fields: tuple[str, str]) -> None:
    """TooLarge above this worker's limits."""
    for name, side_px in zip(fields, size, strict=True):
        if side_px > limits.side_px:
            raise TooLarge(f"makes {side_px}; at most {limits.side_px} pixels a side are made", field=name)
    if size[0] * size[1] > limits.pixels:
        raise TooLarge(
            f"makes {size[0]} x {size[1]}, more than the {limits.pixels} pixels that are made", field=fields[0]
        )


def frame_of(picture: Size, wanted: Size | None, parameters: Mapping[str, Value], limits: PictureLimits) -> Frame:
    """TooLarge about `parameters.short_side_px` where that makes too much."""
    whole = (0, 0, *picture)
    if wanted is None:
        size = _by_short_side(picture, int(parameters.get("short_side_px", 0)), limits)
        return Frame(crop=whole, inner=size, outer=size)
    mode = parameters.get("resize_mode", STRETCH)
    if mode == CROP:
        return Frame(crop=_cut(picture, wanted), inner=wanted, outer=wanted)
    if mode == PAD:
        return Frame(crop=whole, inner=_within(picture, wanted), outer=wanted)
    return Frame(crop=whole, inner=wanted, outer=wanted)


def _by_short_side(picture: Size, short_px: int, limits: PictureLimits) -> Size:
    if not short_px:
        return picture
    scale = short_px / min(picture)
    size = (max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale)))
    check_size(size, limits, fields=("parameters.short_side_px",) * 2)
    return size


def _cut(picture: Size, wanted: Size) -> tuple[int, int, int, int]:
    """The largest middle part of the picture that has the aspect."""
    scale = min(picture[0] / wanted[0], picture[1] / wanted[1])
    width = min(picture[0], max(1, round(wanted[0] * scale)))
    height = min(picture[1], max(1, round(wanted[1] * scale)))
    return (picture[0] - width) // 2, (picture[1] - height) // 2, width, height


def _within(picture: Size, wanted: Size) -> Size:
    """The largest size of the picture's aspect inside the wanted one."""
    scale = min(wanted[0] / picture[0], wanted[1] / picture[1])
    return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))


def working_size(inner: Size, short_px: int, *, in_steps: bool) -> Size:
    """Where an annotator works for a map of this size: the short side as asked for, both rounded to 64 pixels.

    With 0 it is the map's own size; `in_steps` that is rounded, and bounded, too.
    """
    if not short_px and not in_steps:
        return inner
    wanted = short_px / min(inner) if short_px else 1.0
    scale = min(wanted, (WORKING_PIXELS_MAX / (inner[0] * inner[1])) ** 0.5, WORKING_SIDE_MAX_PX / max(inner))
    return _rounded(inner[0] * scale), _rounded(inner[1] * scale)


def _rounded(side: float) -> int:
    """To the step, at least one: a picture of 1 x 5000 is worked on as 64 x 8192."""
    return max(STEP_PX, int(np.round(side / STEP_PX)) * STEP_PX)


def cut(picture: MatLike, crop: tuple[int, int, int, int]) -> MatLike:
    left, top, width, height = crop
    return picture[top : top + height, left : left + width]


def resized(picture: MatLike, size: Size) -> MatLike:
    """A picture at another size; filters as in controlnet_aux's resize_image."""
    height_px, width_px = picture.shape[:2]
    if size == (width_px, height_px):
        return picture
    grows = size[0] * size[1] > width_px * height_px
    return cv2.resize(picture, size, interpolation=cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA)


def fitted(control: MatLike, frame: Frame, *, has_labels: bool) -> MatLike:
    """A map made to fill its frame."""
    height_px, width_px = control.shape[:2]
    if frame.inner != (width_px, height_px):
        shrinks = frame.inner[0] * frame.inner[1] < width_px * height_px
        smooth = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        control = cv2.resize(control, frame.inner, interpolation=cv2.INTER_NEAREST if has_labels else smooth)
    if frame.inner == frame.outer:
        return control
    bordered = np.zeros((frame.outer[1], frame.outer[0], *control.shape[2:]), np.uint8)
    left, top = frame.offset
    bordered[top : top + frame.inner[1], left : left + frame.inner[0]] = control
    return bordered
