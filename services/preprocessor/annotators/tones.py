"""Annotators that look at one pixel at a time: invert and threshold."""

import cv2

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels


def invert(picture: Pixels) -> Pixels:
    return cv2.bitwise_not(picture)


def threshold(picture: Pixels, *, threshold: int) -> Pixels:
    """(H, W), 255 where every channel is above the threshold, else 0."""
    red, green, blue = cv2.split(picture)
    darkest = cv2.min(cv2.min(red, green), blue)
    return cv2.threshold(darkest, threshold, 255, cv2.THRESH_BINARY)[1]


INVERT = Annotator(
    id="invert",
    description="Dark for light and light for dark, such as for lines drawn in black on white",
    apply=invert,
    controlnets=("canny", "lineart", "lineart_anime", "mlsd", "scribble", "softedge"),
)

THRESHOLD = Annotator(
    id="threshold",
    description="White where the picture is light in every channel, black elsewhere",
    apply=threshold,
    controlnets=("scribble",),
    is_bilevel=True,
    parameters=(
        Parameter(
            name="threshold", default=127, minimum=0, maximum=255, description="What is lighter than this is white"
        ),
    ),
)
