"""Edges by Canny's method (Canny 1986), from OpenCV. The same map as controlnet_aux's CannyDetector."""

import cv2
import numpy as np
from cv2.typing import MatLike

from services.kernel.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels

# The largest gradient there is: two Sobel sums of 4 x 255 each.
GRADIENT_MAX = 2040
# How much of a picture is looked at together: 28 bytes a pixel lie in a processor's second cache.
STRIP_PIXELS, STRIP_ROWS_MIN = 32_768, 8


def canny(picture: Pixels, *, low_threshold: int, high_threshold: int, gray: bool) -> Pixels:
    """Edges (H, W), 0 or 255. OpenCV takes the smaller threshold as the low one, whichever it is.

    In colour each pixel's gradient is the strongest of its channels'.
    """
    if gray:
        return cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), low_threshold, high_threshold)
    across, down = strongest_gradient(picture)
    return cv2.Canny(across, down, low_threshold, high_threshold)


def strongest_gradient(picture: Pixels) -> tuple[MatLike, MatLike]:
    """(H, W) int16 twice: each pixel's Sobel gradient in the channel where it is strongest, the first of equals.

    What cv2.Canny does inside for colours, in a third of its time: channel by channel, so that it runs in registers,
    and in strips, so that what is in between stays in the processor's cache and is never paged in anew.
    """
    height, width = picture.shape[:2]
    across, down = np.empty((height, width), np.int16), np.empty((height, width), np.int16)
    rows = min(height, max(STRIP_ROWS_MIN, STRIP_PIXELS // width))
    scratch = _Scratch(rows + 2, width)
    for start in range(0, height, rows):
        # The last strip is as high as the others, and does some rows again.
        top = min(start, height - rows)
        _split(picture, top, scratch)
        x, y = _strongest_in(scratch)
        across[top : top + rows], down[top : top + rows] = x[1:-1], y[1:-1]
    return across, down


class _Scratch:
    """Memory for strips, used over and over. The channels lie one below the other, so that one call does all three."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows = rows
        self.channels = np.empty((3, rows, width), np.uint8)
        self.stack = self.channels.reshape(-1, width)
        self.gradients = np.empty((2, 3 * rows, width), np.int16)
        self.magnitudes = np.empty_like(self.gradients)
        self.is_stronger = np.empty((rows, width), np.uint8)
        # Views, which are cheaper kept than made anew.
        self.x, self.y = self.gradients
        self.magnitude_x, self.magnitude_y = self.magnitudes
        self.across, self.down = (list(each) for each in self.gradients.reshape(2, 3, rows, width))
        self.norms = list(self.magnitude_x.reshape(3, rows, width))


def _split(picture: Pixels, top: int, scratch: _Scratch) -> None:
    """The strip's channels, with the row above and the one below; at a picture's edge its own row once more."""
    end = top - 1 + scratch.rows
    within = picture[max(0, top - 1) : end]
    is_first, is_last = top == 0, end > len(picture)
    channels = scratch.channels[:, int(is_first) : scratch.rows - int(is_last)]
    cv2.split(within, list(channels))
    if is_first:
        scratch.channels[:, 0] = scratch.channels[:, 1]
    if is_last:
        scratch.channels[:, -1] = scratch.channels[:, -2]


def _strongest_in(scratch: _Scratch) -> tuple[MatLike, MatLike]:
    """As `strongest_gradient`, of the split strip, but for its first row and its last one: there channels touch."""
    across, down, norms, is_stronger = scratch.across, scratch.down, scratch.norms, scratch.is_stronger
    cv2.spatialGradient(scratch.stack, scratch.x, scratch.y, borderType=cv2.BORDER_REPLICATE)
    np.abs(scratch.gradients, out=scratch.magnitudes)
    cv2.add(scratch.magnitude_x, scratch.magnitude_y, scratch.magnitude_x)
    for best, other in ((0, 1), (1, 2)):
        cv2.compare(norms[other], norms[best], cv2.CMP_GT, is_stronger)
        cv2.copyTo(across[other], is_stronger, across[0])
        cv2.copyTo(down[other], is_stronger, down[0])
        if other == 1:
            cv2.max(norms[0], norms[1], norms[1])
    return across[0], down[0]


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
