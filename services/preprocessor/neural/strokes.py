"""What soft edges become when they are drawn as scribbles or made safe. As in controlnet_aux's util."""

from typing import Any

import cv2
import numpy as np

from services.preprocessor.annotator import Pixels

# Of a ridge, and of the stroke that is drawn for it.
RIDGE_MIN, STROKE_MIN, STROKE_SIGMA = 127, 4, 3.0
_RIDGES = (
    ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
)


def stepped(values: Any, steps: int) -> Any:
    """Numbers in 0 to 1 on few levels, so that faint traces of the picture's content cannot leak into an edge map."""
    return (values.astype(np.float32) * float(steps + 1)).astype(np.int32).astype(np.float32) / float(steps)


def scribbled(edges: Pixels) -> Pixels:
    """Strokes (H, W), 0 or 255, along the ridges of an edge map."""
    smooth = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), STROKE_SIGMA)
    ridges = np.zeros_like(smooth)
    for kernel in _RIDGES:
        np.putmask(ridges, cv2.dilate(smooth, np.array(kernel, np.uint8)) == smooth, smooth)
    strokes = np.where(ridges > RIDGE_MIN, np.uint8(255), np.uint8(0))
    spread = cv2.GaussianBlur(strokes, (0, 0), STROKE_SIGMA)
    return np.where(spread > STROKE_MIN, np.uint8(255), np.uint8(0))
