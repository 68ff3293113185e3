"""Draws outline-heart.png: a control image made by hand rather than by an annotator. White on black, 512 x 512."""

from pathlib import Path

import cv2
import numpy as np

SIDE_PX = 512
LINE_PX = 6
# OpenCV takes coordinates in sixteenths of a pixel.
SHIFT = 4


def heart() -> np.ndarray:
    """Points (N, 2) of x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, in pixels."""
    t = np.linspace(0, 2 * np.pi, 400)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([SIDE_PX / 2 + x * SIDE_PX / 40, SIDE_PX * 0.46 - y * SIDE_PX / 40], axis=1)


def main() -> None:
    canvas = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    points = (heart() * 2**SHIFT).round().astype(np.int32)
    cv2.polylines(canvas, [points], True, 255, LINE_PX, cv2.LINE_AA, SHIFT)
    cv2.imwrite(str(Path(__file__).with_name("outline-heart.png")), canvas)


if __name__ == "__main__":
    main()
