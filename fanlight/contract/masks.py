"""What a mask is made of, its options and their checks, and the sizes that outpainting and `only_masked` lead to.

Sizes are (width, height) in pixels; those of images are upright.
"""

from dataclasses import dataclass
from typing import TypedDict

from fanlight.contract.limits import (
    ANNOTATION_SIDE_MAX_PX,
    ANNOTATION_SIDE_MIN_PX,
    DEFAULT_MASK_BLUR_PX,
    DEFAULT_MASK_PADDING_PX,
    IMPLIED_PIXELS_LIMIT,
    MASK_BLUR_LIMIT_PX,
    MASK_PADDING_LIMIT_PX,
    OUTPAINT_LIMIT_PX,
    PASTED_PIXELS_LIMIT,
    SIDE_MAX_PX,
    check_choice,
    check_number,
    check_whole,
    size_of_source,
)
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import InvalidField, TooLarge

Size = tuple[int, int]

MASK_FILLS = ORIGINAL, BLURRED, NOISE, NOTHING = ("original", "blurred", "noise", "nothing")
OUTPAINTING = ("outpaint_left_px", "outpaint_right_px", "outpaint_top_px", "outpaint_bottom_px")


class MaskOptions(TypedDict, total=False):
    """Those of inpainting and outpainting, by their field names; None leaves one unset."""

    mask_blur: float | None
    only_masked: bool | None
    mask_padding: int | None
    # One of MASK_FILLS.
    mask_fill: str | None
    mask_invert: bool | None
    mask_from_alpha: bool | None
    # How many pixels the image grows at each side.
    outpaint_left_px: int | None
    outpaint_right_px: int | None
    outpaint_top_px: int | None
    outpaint_bottom_px: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """By how many pixels of an image outpainting makes it grow."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return any((self.left, self.right, self.top, self.bottom))

    def around(self, size: Size) -> Size:
        """The size of the image and its new sides."""
        return self.left + size[0] + self.right, self.top + size[1] + self.bottom

    def filling(self, size: Size, asked: Size, step_px: int) -> "Sides":
        """A bit larger where the size asked for is the next whole step: so the image itself need not be scaled."""
        width, height = self.around(size)
        more_x = asked[0] - width if 0 < asked[0] - width < step_px else 0
        more_y = asked[1] - height if 0 < asked[1] - height < step_px else 0
        return Sides(
            left=self.left + (more_x if self.left and not self.right else 0),
            right=self.right + (more_x if self.right else 0),
            top=self.top + (more_y if self.top and not self.bottom else 0),
            bottom=self.bottom + (more_y if self.bottom else 0),
        )


def has_mask(request: GenerateRequest) -> bool:
    """Whether a part of the image is to be replaced: by a mask, by its transparency, or at new sides."""
    return request.HasField("mask") or request.mask_from_alpha or bool(sides_of(request))


def sides_of(request: GenerateRequest) -> Sides:
    return Sides(
        left=request.outpaint_left_px,
        right=request.outpaint_right_px,
        top=request.outpaint_top_px,
        bottom=request.outpaint_bottom_px,
    )


def mask_blur_of(request: GenerateRequest) -> float:
    """Deviation of the blur, 0 to 64."""
    return request.mask_blur if request.HasField("mask_blur") else DEFAULT_MASK_BLUR_PX


def mask_padding_of(request: GenerateRequest) -> int:
    """Pixels around the mask, 0 to 1024."""
    return request.mask_padding if request.HasField("mask_padding") else DEFAULT_MASK_PADDING_PX


def check_mask_options(request: GenerateRequest, *, is_masked: bool) -> None:
    """InvalidField. `is_masked`: its pipeline replaces a part of the image."""
    check_number(request.mask_blur, 0.0, MASK_BLUR_LIMIT_PX, field="mask_blur")
    check_whole(request.mask_padding, 0, MASK_PADDING_LIMIT_PX, field="mask_padding")
    check_choice(request.mask_fill, MASK_FILLS, field="mask_fill")
    for field in OUTPAINTING:
        check_whole(getattr(request, field), 0, OUTPAINT_LIMIT_PX, field=field)
    if request.mask_invert and not (request.HasField("mask") or request.mask_from_alpha):
        raise InvalidField("is for a mask, and there is none", field="mask_invert")
    if is_masked:
        if request.HasField("mask_padding") and not request.only_masked:
            raise InvalidField("is for only_masked, which is not set", field="mask_padding")
        return
    given = {
        "mask_blur": request.HasField("mask_blur"),
        "only_masked": request.only_masked,
        "mask_padding": request.HasField("mask_padding"),
        "mask_fill": bool(request.mask_fill),
    }
    given |= {field: bool(getattr(request, field)) for field in OUTPAINTING}
    for field, is_given in given.items():
        if is_given:
            raise InvalidField("is for inpainting, and no part of an image is masked", field=field)


def is_alike(mask: Size, image: Size) -> bool:
    """Whether a mask has the image's aspect ratio: scaled to its size it is off by a pixel at most."""
    width, height = mask[0] * image[1] / mask[1], mask[1] * image[0] / mask[0]
    return abs(width - image[0]) <= 1 or abs(height - image[1]) <= 1


def refuse_mask(mask: Size, image: Size) -> InvalidField:
    said = [f"{width} x {height}" for width, height in (mask, image)]
    return InvalidField(f"is {said[0]} pixels, the image {said[1]}; they must have one aspect ratio", field="mask")


def size_of_outpainted(image: Size, sides: Sides, step_px: int) -> Size:
    """The size that a request without one takes from its image and new sides.

    The next whole step, so that the image keeps its pixels; scaled down where that is too large.
    """
    whole = sides.around(image)
    if not sides:
        return size_of_source(*whole, step_px)
    width, height = (-(-side_px // step_px) * step_px for side_px in whole)
    if width * height > IMPLIED_PIXELS_LIMIT or max(width, height) > SIDE_MAX_PX:
        return size_of_source(*whole, step_px)
    grown = sides.filling(image, (width, height), step_px).around(image)
    return size_of_source(*grown, step_px)


def check_pasted(image: Size, sides: Sides) -> Size:
    """The size of a result that keeps its image's. TooLarge."""
    width, height = sides.around(image)
    if width * height > PASTED_PIXELS_LIMIT:
        raise TooLarge(
            f"gives a result of {width} x {height} pixels; with only_masked at most {PASTED_PIXELS_LIMIT} are made",
            field="image",
        )
    return width, height


def size_of_control_image(image: Size, asked: Size, sides: Sides, *, only_masked: bool, resize: str) -> Size:
    """The size at which a control image lies on the image: thin lines do not survive being scaled later.

    `asked`: what is generated. Within the sides of an annotation.
    """
    if not sides and not only_masked:
        return asked
    width, height = sides.around(image)
    across, down = (1.0, 1.0) if only_masked else (asked[0] / width, asked[1] / height)
    if resize != "stretch":
        across = down = min(across, down) if resize == "pad" else max(across, down)
    return _annotated(image[0] * across), _annotated(image[1] * down)


def _annotated(side_px: float) -> int:
    return min(max(round(side_px), ANNOTATION_SIDE_MIN_PX), ANNOTATION_SIDE_MAX_PX)
