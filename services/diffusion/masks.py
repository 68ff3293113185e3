"""Masks: read from whatever people send, blurred, and the part of an image that they are about. Loads no torch.

A mask is a Pillow image of mode L: 255 is replaced, 0 stays as it is. Boxes are left, top, right, bottom.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageFilter, ImageOps

from fanlight.contract.limits import BLUR_REACH

Box = tuple[int, int, int, int]
Size = tuple[int, int]

WHITE = 255
# What is darker counts as black, and what is lighter than its opposite as white: in a JPEG they are not clean.
NEARLY_BLACK = 16
_NEARLY_WHITE = WHITE - NEARLY_BLACK
_LEVELS = [
    round(min(max((value - NEARLY_BLACK) / (_NEARLY_WHITE - NEARLY_BLACK), 0.0), 1.0) * WHITE) for value in range(256)
]
# Wider kernels work on a smaller copy of the mask.
_RADIUS_LIMIT_PX = 32


def read_mask(rgba: Image.Image) -> Image.Image:
    """The mask in an image of mode RGBA: its opacity where that varies or nothing is opaque, else its brightness."""
    alpha = rgba.getchannel("A")
    low, high = alpha.getextrema()
    varies = low != high or high == 0
    return (alpha if varies else rgba.convert("RGB").convert("L")).point(_LEVELS)


def transparency(rgba: Image.Image) -> Image.Image:
    """The mask of what is transparent in an image of mode RGBA."""
    return ImageOps.invert(rgba.getchannel("A")).point(_LEVELS)


def on_white(rgba: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def blurred(mask: Image.Image, deviation_px: float) -> Image.Image:
    """The mask under a Gaussian that ends after two deviations: what is farther away is as before."""
    reach = round(BLUR_REACH * deviation_px)
    box = mask.getbbox()
    if not reach or box is None:
        return mask
    left, top, right, bottom = grown(box, reach, mask.size)
    # Beyond an edge of the image the mask goes on, so that it does not fade there.
    values = np.pad(np.asarray(mask.crop((left, top, right, bottom))), reach, mode="edge")
    factor = -(-reach // _RADIUS_LIMIT_PX)
    soft = _convolved(values, deviation_px, reach) if factor == 1 else _coarse(values, deviation_px, reach, factor)
    inside = soft[reach : reach + bottom - top, reach : reach + right - left]
    result = Image.new("L", mask.size)
    result.paste(Image.fromarray(inside), (left, top))
    return result


def _coarse(values: npt.NDArray[np.uint8], deviation_px: float, reach: int, factor: int) -> npt.NDArray[np.uint8]:
    """As `_convolved`, on a copy that is smaller by the factor; reaches no farther."""
    image = Image.fromarray(values)
    # The copy and its way back each reach a pixel of the copy farther.
    small = _convolved(np.asarray(image.reduce(factor)), deviation_px / factor, reach // factor - 2)
    return np.asarray(Image.fromarray(small).resize(image.size, Image.Resampling.BILINEAR))


def _convolved(values: npt.NDArray[np.uint8], deviation: float, reach: int) -> npt.NDArray[np.uint8]:
    """Values (H, W), 0 to 255, under the Gaussian's kernel of 2 x `reach` + 1 values in both directions."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2).astype(np.float32)
    weights /= weights.sum()
    soft = values.astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(soft, [(reach, reach) if axis == own else (0, 0) for own in (0, 1)], mode="edge")
        length = soft.shape[axis]
        soft = np.zeros_like(soft)
        for shift, weight in enumerate(weights):
            soft += weight * padded.take(range(shift, shift + length), axis=axis)
    return np.rint(soft).astype(np.uint8)


def shown(mask: Image.Image, deviation_px: float) -> Image.Image:
    """How much of what was generated shows: all of it under the mask, fading outwards over the blur.

    Twice the blurred mask, as A1111 lays its overlay; and never less than the mask, so that thin lines show too.
    """
    soft = blurred(mask, deviation_px).point(lambda value: min(2 * value, WHITE))
    return ImageChops.lighter(soft, mask)


def grown(box: Box, by_px: int, size: Size) -> Box:
    left, top, right, bottom = box
    return max(left - by_px, 0), max(top - by_px, 0), min(right + by_px, size[0]), min(bottom + by_px, size[1])


def crop_region(mask: Image.Image, padding_px: int) -> Box | None:
    """The box of all that is not black, with so many pixels around it; None for a black mask. As A1111's masking.py."""
    box = mask.getbbox()
    return None if box is None else grown(box, padding_px, mask.size)


def expanded(region: Box, asked: Size, size: Size) -> Box:
    """The region, grown to the aspect ratio asked for as far as the image goes. As A1111's masking.py."""
    left, top, right, bottom = region
    ratio = asked[0] / asked[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widened(top, bottom, (right - left) / ratio, size[1])
    else:
        left, right = _widened(left, right, (bottom - top) * ratio, size[0])
    return left, top, right, bottom


def _widened(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """Around its middle to that length; moved, then cut, to lie within 0 and the limit."""
    more = int(length - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high >= limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


# Radii of the blurs that are laid over each other, and how often each.
_FILLS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The RGB image with the colors from around the mask, blurred, in the mask's place. As A1111's masking.py.

    Where no color reaches, the image stays.
    """
    kept = Image.new("RGBa", image.size)
    kept.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    laid = image.convert("RGBA")
    for radius, times in _FILLS:
        layer = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            laid.alpha_composite(layer)
    return laid.convert("RGB")
