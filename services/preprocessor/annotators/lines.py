"""Lines and strokes without a network: lineart_standard, scribble_xdog and lsd."""

import cv2
import numpy as np
from cv2.typing import MatLike

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels

# Contrast is divided by at least this, so that an image of faint lines is not stretched to full contrast.
MEDIAN_FLOOR = 16
# The blurs whose difference scribble_xdog takes, in pixels.
NEAR_SIGMA, FAR_SIGMA = 0.5, 5.0
# OpenCV's line segment detector needs a neighborhood of this size.
LSD_SIDE_MIN_PX = 8


def darkness(image: Pixels, *, near_sigma: float, far_sigma: float) -> MatLike:
    """How much darker each pixel is than its surroundings: (H, W) float32, -255 to 255, of an image (H, W, 3) uint8.

    The far blur minus the near one (no blur at sigma 0), in the channel where that is least. Channel by channel,
    because a float copy of a whole image needs 12 bytes per pixel.
    """
    red, green, blue = (_difference(channel, near_sigma, far_sigma) for channel in cv2.split(image))
    return cv2.min(cv2.min(red, green), blue)


def _difference(channel: Pixels, near_sigma: float, far_sigma: float) -> MatLike:
    """(H, W) float32 of one channel (H, W) uint8."""
    sharp = channel.astype(np.float32)
    far = cv2.GaussianBlur(sharp, (0, 0), far_sigma)
    near = cv2.GaussianBlur(sharp, (0, 0), near_sigma) if near_sigma else sharp
    return np.subtract(far, near, out=far)


def lineart_standard(image: Pixels, *, gaussian_sigma: float, intensity_threshold: int) -> Pixels:
    """Lines (H, W) uint8, white on black, of an image (H, W, 3); the median line has the value 127.

    The map equals that of controlnet_aux's LineartStandardDetector.
    """
    intensity = darkness(image, near_sigma=0, far_sigma=gaussian_sigma)
    np.clip(intensity, 0, 255, out=intensity)
    lines = intensity[intensity > intensity_threshold]
    np.divide(intensity, max(MEDIAN_FLOOR, np.median(lines) if lines.size else 0), out=intensity)
    np.multiply(intensity, 127, out=intensity)
    return np.clip(intensity, 0, 255, out=intensity).astype(np.uint8)


def scribble_xdog(image: Pixels, *, threshold: int) -> Pixels:
    """Strokes (H, W) uint8, 0 or 255, of an image (H, W, 3), by an extended difference of Gaussians (XDoG).

    After Winnemoeller 2011: 255 where the near blur is darker than the far one by more than half the threshold. The
    defaults are those of A1111.
    """
    strokes = darkness(image, near_sigma=NEAR_SIGMA, far_sigma=FAR_SIGMA) > threshold // 2
    return strokes.astype(np.uint8) * np.uint8(255)


def lsd(image: Pixels, *, minimum_length: float) -> Pixels:
    """Straight lines (H, W) uint8, 0 or 255, one pixel wide, of an image (H, W, 3).

    By OpenCV's line segment detector (Grompone von Gioi et al. 2010).
    """
    height, width = image.shape[:2]
    canvas = np.zeros((height, width), np.uint8)
    if min(height, width) < LSD_SIDE_MIN_PX:
        return canvas
    found = cv2.createLineSegmentDetector().detect(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    for x1, y1, x2, y2 in np.reshape(found, (-1, 4)) if found is not None else ():
        if np.hypot(x2 - x1, y2 - y1) >= minimum_length:
            cv2.line(canvas, (round(float(x1)), round(float(y1))), (round(float(x2)), round(float(y2))), 255, 1)
    return canvas


def lineart_parameters(*, gaussian_sigma: float, intensity_threshold: int) -> tuple[Parameter, ...]:
    """The parameters of `lineart_standard` with these defaults."""
    return (
        Parameter(
            name="gaussian_sigma",
            default=gaussian_sigma,
            minimum=0.1,
            maximum=64,
            description="How far a pixel's surroundings reach, in pixels",
        ),
        Parameter(
            name="intensity_threshold",
            default=intensity_threshold,
            minimum=0,
            maximum=255,
            description="The contrast is set by the pixels that are darker than their surroundings by more than this",
        ),
    )


LINEART_STANDARD = Annotator(
    id="lineart_standard",
    description="Lines of drawings and photographs, white on black",
    apply=lineart_standard,
    controlnets=("lineart",),
    parameters=lineart_parameters(gaussian_sigma=6.0, intensity_threshold=8),
)

SCRIBBLE_XDOG = Annotator(
    id="scribble_xdog",
    description="Rough strokes, white on black",
    apply=scribble_xdog,
    controlnets=("scribble",),
    is_bilevel=True,
    parameters=(
        Parameter(name="threshold", default=32, minimum=1, maximum=64, description="Higher gives fewer strokes"),
    ),
)

LSD = Annotator(
    id="lsd",
    description="Straight lines, without a network",
    apply=lsd,
    controlnets=("mlsd",),
    is_bilevel=True,
    parameters=(
        Parameter(
            name="minimum_length",
            default=20.0,
            minimum=0,
            maximum=4096,
            description="Lines shorter than this are dropped, in pixels",
        ),
    ),
)
