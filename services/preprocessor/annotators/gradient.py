"""The strongest gradient of a picture's channels, by gradient.c, which an installation compiles where it can."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.preprocessor.annotator import Pixels

LIBRARY = Path(__file__).with_name("libgradient.so")
CHANNELS = 3


def strongest_gradient(picture: Pixels) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]] | None:
    """(H, W) twice: each pixel's Sobel gradient, across and down, in the channel where it is strongest, the first of
    equals. `picture` (H, W, 3), at least 1 x 1. None where nothing was compiled.
    """
    compiled = _compiled()
    if compiled is None:
        return None
    height, width, channels = picture.shape
    assert channels == CHANNELS
    pixels = np.ascontiguousarray(picture, np.uint8)
    across, down = np.empty((height, width), np.int16), np.empty((height, width), np.int16)
    scratch = np.empty(3 * CHANNELS * (width + 2), np.uint8)
    compiled(pixels.ctypes.data, height, width, scratch.ctypes.data, across.ctypes.data, down.ctypes.data)
    return across, down


@cache
def _compiled() -> Callable[..., Any] | None:
    try:
        function = ctypes.CDLL(str(LIBRARY)).strongest_gradient
    except OSError:  # there is none, or it is another machine's
        return None
    pointer, length = ctypes.c_void_p, ctypes.c_ssize_t
    function.argtypes, function.restype = (pointer, length, length, pointer, pointer, pointer), None
    return function
