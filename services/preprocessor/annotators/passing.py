"""Annotators that leave the picture as it is: ip2p, and inpaint, which keeps what is to be painted anew transparent."""

import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels


def ip2p(picture: Pixels) -> Pixels:
    return picture


def inpaint(picture: Pixels, *, threshold: int) -> Pixels:
    """(H, W, 4): opaque, or wholly transparent and black where the picture is more transparent than the threshold.

    Transparent stands for the -1 that the ControlNet knows a missing pixel by.
    """
    is_kept = picture[:, :, 3] > threshold
    return np.where(is_kept[:, :, None], picture | np.array([0, 0, 0, 255], np.uint8), np.uint8(0))


IP2P = Annotator(
    id="ip2p",
    description="The picture itself, for ControlNets that are told what to change",
    apply=ip2p,
    controlnets=("ip2p", "shuffle"),
)

INPAINT = Annotator(
    id="inpaint",
    description="The picture without its transparent parts, which are to be painted anew",
    apply=inpaint,
    controlnets=("inpaint",),
    keeps_alpha=True,
    has_labels=True,
    parameters=(
        Parameter(name="threshold", default=127, minimum=0, maximum=254, description="More opaque than this is kept"),
    ),
)
