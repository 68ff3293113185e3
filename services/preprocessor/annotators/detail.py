"""Annotators that take detail away for the tile ControlNet to invent anew: tile and blur_gaussian."""

import cv2

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels


def tile(picture: Pixels, *, down_sampling_rate: float) -> Pixels:
    """The picture made smaller by the rate and brought back to its size. A rate of 1 leaves it as it is."""
    height, width = picture.shape[:2]
    small = (max(1, int(width / down_sampling_rate)), max(1, int(height / down_sampling_rate)))
    if small == (width, height):
        return picture
    coarse = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def blur_gaussian(picture: Pixels, *, sigma: float) -> Pixels:
    return cv2.GaussianBlur(picture, (0, 0), sigma)


TILE = Annotator(
    id="tile",
    description="The picture itself, with less detail where asked",
    apply=tile,
    controlnets=("tile",),
    parameters=(
        Parameter(
            name="down_sampling_rate",
            default=1.0,
            minimum=1,
            maximum=64,
            description="How many times smaller each side is in between; 8 is three steps of a pyramid",
        ),
    ),
)

BLUR_GAUSSIAN = Annotator(
    id="blur_gaussian",
    description="The picture out of focus",
    apply=blur_gaussian,
    controlnets=("tile",),
    parameters=(Parameter(name="sigma", default=9.0, minimum=0.01, maximum=64, description="In pixels"),),
)
