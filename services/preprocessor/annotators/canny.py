"""Edges by Canny's method (Canny 1986), from OpenCV. The map equals that of controlnet_aux's CannyDetector.

For color images the gradient comes from gradient.c, which is compiled at installation if there is a C compiler.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels

# The largest possible gradient: the sum of two Sobel sums of 4 x 255 each.
GRADIENT_MAX = 2040
LIBRARY = Path(__file__).with_name("libgradient.so")
CHANNELS = 3

Gradient = npt.NDArray[np.int16]


def canny(image: Pixels, *, low_threshold: int, high_threshold: int, gray: bool) -> Pixels:
    """Edges (H, W) uint8, 0 or 255, of an image (H, W, 3). OpenCV takes the smaller threshold as the low one.

    In color each pixel has the gradient of its strongest channel. OpenCV computes that too, but ten times slower.
    """
    if gray:
        return cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low_threshold, high_threshold)
    gradient = strongest_gradient(image)
    if gradient is None:
        return cv2.Canny(image, low_threshold, high_threshold)
    return cv2.Canny(*gradient, low_threshold, high_threshold)


def strongest_gradient(image: Pixels) -> tuple[Gradient, Gradient] | None:
    """(H, W) int16 twice, -1020 to 1020: each pixel's Sobel gradient in x and in y, in the channel where it is
    strongest (the first of equals). `image` (H, W, 3) uint8, at least 1 x 1. None if gradient.c was not compiled.
    """
    compiled = _compiled()
    if compiled is None:
        return None
    height, width, channels = image.shape
    assert channels == CHANNELS
    pixels = np.ascontiguousarray(image, np.uint8)
    across, down = np.empty((height, width), np.int16), np.empty((height, width), np.int16)
    scratch = np.empty(3 * CHANNELS * (width + 2), np.uint8)
    compiled(pixels.ctypes.data, height, width, scratch.ctypes.data, across.ctypes.data, down.ctypes.data)
    return across, down


@cache
def _compiled() -> Callable[..., Any] | None:
    try:
        function = ctypes.CDLL(str(LIBRARY)).strongest_gradient
    except OSError:  # it does not exist, or was compiled for another machine
        return None
    pointer, length = ctypes.c_void_p, ctypes.c_ssize_t
    function.argtypes, function.restype = (pointer, length, length, pointer, pointer, pointer), None
    return function


CANNY = Annotator(
    id="canny",
    description="Edges, white on black",
    apply=canny,
    controlnets=("canny",),
    is_bilevel=True,
    parameters=(
        Parameter(
            name="low_threshold",
            default=100,
            minimum=0,
            maximum=GRADIENT_MAX,
            description="Edges weaker than this are dropped",
        ),
        Parameter(
            name="high_threshold",
            default=200,
            minimum=0,
            maximum=GRADIENT_MAX,
            description="Edges stronger than this are kept, with the weaker ones that touch them",
        ),
        Parameter(name="gray", default=False, description="Use brightness alone instead of every color channel"),
    ),
)
