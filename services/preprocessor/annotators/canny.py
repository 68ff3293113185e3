"""Edges by Canny's method (Canny 1986), from OpenCV. The same map as controlnet_aux's CannyDetector."""

import cv2

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.annotators.gradient import strongest_gradient

# The largest gradient there is: two Sobel sums of 4 x 255 each.
GRADIENT_MAX = 2040


def canny(picture: Pixels, *, low_threshold: int, high_threshold: int, gray: bool) -> Pixels:
    """Edges (H, W), 0 or 255. OpenCV takes the smaller threshold as the low one, whichever it is.

    In colour each pixel's gradient is the strongest of its channels'. OpenCV looks for it too, in ten times the time.
    """
    if gray:
        return cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), low_threshold, high_threshold)
    gradient = strongest_gradient(picture)
    if gradient is None:
        return cv2.Canny(picture, low_threshold, high_threshold)
    return cv2.Canny(*gradient, low_threshold, high_threshold)


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
        Parameter(name="gray", default=False, description="Look at brightness alone instead of every colour channel"),
    ),
)
