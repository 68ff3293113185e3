"""What line annotators without a network share: how much darker than its surroundings a pixel is."""

import cv2
import numpy as np
from cv2.typing import MatLike

from services.preprocessor.annotator import Pixels


def darkness(picture: Pixels, *, near_sigma: float, far_sigma: float) -> MatLike:
    """(H, W) float32: the far blur less the near one (none at sigma 0), in the channel where that is least.

    Channel by channel, because a float copy of a large picture has 12 bytes a pixel.
    """
    red, green, blue = (_difference(channel, near_sigma, far_sigma) for channel in cv2.split(picture))
    return cv2.min(cv2.min(red, green), blue)


def _difference(channel: Pixels, near_sigma: float, far_sigma: float) -> MatLike:
    sharp = channel.astype(np.float32)
    far = cv2.GaussianBlur(sharp, (0, 0), far_sigma)
    near = cv2.GaussianBlur(sharp, (0, 0), near_sigma) if near_sigma else sharp
    return np.subtract(far, near, out=far)
