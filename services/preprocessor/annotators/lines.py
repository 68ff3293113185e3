"""Straight lines by the line segment detector (Grompone von Gioi et al. 2010), from OpenCV; needs no weights."""

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels

# The detector needs a neighbourhood to look at.
SIDE_MIN_PX = 8


def lsd(picture: Pixels, *, minimum_length: float) -> Pixels:
    """Lines (H, W), 0 or 255, one pixel wide."""
    height, width = picture.shape[:2]
    canvas = np.zeros((height, width), np.uint8)
    if min(height, width) < SIDE_MIN_PX:
        return canvas
    found = cv2.createLineSegmentDetector().detect(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))[0]
    for x1, y1, x2, y2 in np.reshape(found, (-1, 4)) if found is not None else ():
        if np.hypot(x2 - x1, y2 - y1) >= minimum_length:
            cv2.line(canvas, (round(float(x1)), round(float(y1))), (round(float(x2)), round(float(y2))), 255, 1)
    return canvas


LSD = Annotator(
    id="lsd",
    description="Straight lines, without a network",
    apply=lsd,
    controlnets=("mlsd",),
    is_bilevel=True,
    parameters=(
        Parameter(
            name="minimum_length", default=20.0, minimum=0, maximum=4096, description="Shorter lines go, in pixels"
        ),
    ),
)
