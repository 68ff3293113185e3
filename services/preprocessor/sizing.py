"""How large a control image is, how an image is made to fit, and at what size an annotator works. Pure arithmetic.

Images here are uint8 arrays (H, W), (H, W, 3) or (H, W, 4); sizes are (width, height).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from cv2.typing import MatLike

from fanlight.contract.parameters import Parameter, Value
from fanlight.errors import TooLarge
from services.kernel.images import ImageLimits

# Width and height in pixels.
Size: TypeAlias = tuple[int, int]
# Left, top, width and height in pixels.
CropBox: TypeAlias = tuple[int, int, int, int]

STRETCH, CROP, PAD = "stretch", "crop", "pad"
# Networks halve each side up to six times; controlnet_aux rounds to the same multiple.
ALIGN_PX = 64
# However large, or long and thin, an image is, an annotator works on no more than this.
WORKING_PIXELS_MAX, WORKING_SIDE_MAX_PX = 4_194_304, 8_192
SIDE_MAX_PX = 32_766

SIZE_PARAMETERS = (
    Parameter(
        name="resize_mode",
        default=STRETCH,
        choices=(STRETCH, CROP, PAD),
        description="How an image of another aspect ratio fits a given width and height: stretched, cropped to its "
        "middle, or padded with black",
    ),
    Parameter(
        name="short_side_px",
        default=0,
        minimum=0,
        maximum=SIDE_MAX_PX,
        description="Without a width and height: the control image's short side in pixels; 0 keeps the image's size",
    ),
)


def detect_resolution_parameter(default: int, *, aligned: bool) -> Parameter:
    own = "the control image's own size" + (", rounded too" if aligned else "")
    return Parameter(
        name="detect_resolution",
        default=default,
        minimum=0,
        maximum=4096,
        description=f"The short side at which it works, in pixels, rounded to {ALIGN_PX}; 0 is {own}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CropFrame:
    """`crop` is the part of the image that is used. The map fills `inner`, which is centered in `outer`."""

    crop: CropBox
    inner: Size
    outer: Size

    @property
    def offset(self) -> Size:
        """Left and top of `inner` in `outer`."""
        return (self.outer[0] - self.inner[0]) // 2, (self.outer[1] - self.inner[1]) // 2


def check_size(size: Size, limits: ImageLimits, *, fields: tuple[str, str]) -> None:
    """TooLarge above this worker's limits."""
    for name, side_px in zip(fields, size, strict=True):
        if side_px > limits.side_px:
            raise TooLarge(f"gives a side of {side_px} pixels; at most {limits.side_px} are allowed", field=name)
    if size[0] * size[1] > limits.pixels:
        raise TooLarge(
            f"gives {size[0]} x {size[1]} pixels; at most {limits.pixels} in all are allowed", field=fields[0]
        )


def crop_frame(image: Size, requested: Size | None, parameters: Mapping[str, Value], limits: ImageLimits) -> CropFrame:
    """TooLarge about `parameters.short_side_px` if that gives a control image above the limits."""
    whole = (0, 0, *image)
    if requested is None:
        size = _by_short_side(image, int(parameters.get("short_side_px", 0)), limits)
        return CropFrame(crop=whole, inner=size, outer=size)
    mode = parameters.get("resize_mode", STRETCH)
    if mode == CROP:
        return CropFrame(crop=_center_crop(image, requested), inner=requested, outer=requested)
    if mode == PAD:
        return CropFrame(crop=whole, inner=_fit_inside(image, requested), outer=requested)
    return CropFrame(crop=whole, inner=requested, outer=requested)


def _by_short_side(image: Size, short_px: int, limits: ImageLimits) -> Size:
    if not short_px:
        return image
    scale = short_px / min(image)
    size = (max(1, round(image[0] * scale)), max(1, round(image[1] * scale)))
    check_size(size, limits, fields=("parameters.short_side_px",) * 2)
    return size


def _center_crop(image: Size, requested: Size) -> CropBox:
    """The largest part around the image's center that has the requested aspect ratio."""
    scale = min(image[0] / requested[0], image[1] / requested[1])
    width = min(image[0], max(1, round(requested[0] * scale)))
    height = min(image[1], max(1, round(requested[1] * scale)))
    return (image[0] - width) // 2, (image[1] - height) // 2, width, height


def _fit_inside(image: Size, requested: Size) -> Size:
    """The largest size of the image's aspect ratio inside the requested one."""
    scale = min(requested[0] / image[0], requested[1] / image[1])
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def working_size(inner: Size, short_px: int, *, aligned: bool) -> Size:
    """The size at which an annotator works for a map of size `inner`: with `short_px` as short side, each side rounded
    to a multiple of 64.

    With `short_px` 0 it is `inner` itself, which `aligned` rounds and bounds too.
    """
    if not short_px and not aligned:
        return inner
    requested = short_px / min(inner) if short_px else 1.0
    scale = min(requested, (WORKING_PIXELS_MAX / (inner[0] * inner[1])) ** 0.5, WORKING_SIDE_MAX_PX / max(inner))
    return _align(inner[0] * scale), _align(inner[1] * scale)


def _align(side: float) -> int:
    """To the nearest multiple of 64, at least 64: an image of 1 x 5000 is processed as 64 x 8192."""
    return max(ALIGN_PX, int(np.round(side / ALIGN_PX)) * ALIGN_PX)


def crop(image: MatLike, box: CropBox) -> MatLike:
    """The part (h, w, ...) of an image (H, W, ...); a view, not a copy."""
    left, top, width, height = box
    return image[top : top + height, left : left + width]


def resize(image: MatLike, size: Size) -> MatLike:
    """An image (H, W, ...) at another size; the filters are those of controlnet_aux's resize_image."""
    height_px, width_px = image.shape[:2]
    if size == (width_px, height_px):
        return image
    grows = size[0] * size[1] > width_px * height_px
    return cv2.resize(image, size, interpolation=cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA)


def fit_to_frame(control: MatLike, frame: CropFrame, *, has_labels: bool) -> MatLike:
    """A map (H, W, ...) uint8, resized to `frame.inner` and padded with 0 to `frame.outer`.

    With `has_labels` no new values appear: the map's colors are labels, which must not be mixed.
    """
    height_px, width_px = control.shape[:2]
    if frame.inner != (width_px, height_px):
        shrinks = frame.inner[0] * frame.inner[1] < width_px * height_px
        smooth = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        control = cv2.resize(control, frame.inner, interpolation=cv2.INTER_NEAREST if has_labels else smooth)
    if frame.inner == frame.outer:
        return control
    padded = np.zeros((frame.outer[1], frame.outer[0], *control.shape[2:]), np.uint8)
    left, top = frame.offset
    padded[top : top + frame.inner[1], left : left + frame.inner[0]] = control
    return padded
