"""Scribbles by an extended difference of Gaussians (Winnemoeller 2011), with the defaults that A1111 users know."""

import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.annotators.strokes import darkness

NEAR_SIGMA, FAR_SIGMA = 0.5, 5.0


def scribble_xdog(picture: Pixels, *, threshold: int) -> Pixels:
    """Strokes (H, W), 0 or 255: 255 where the near blur is darker than the far one by more than half the threshold."""
    strokes = darkness(picture, near_sigma=NEAR_SIGMA, far_sigma=FAR_SIGMA) > threshold // 2
    return strokes.astype(np.uint8) * np.uint8(255)


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
