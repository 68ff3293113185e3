"""Moves the picture's content around, so that colours and style stay and shapes go.

The same map as controlnet_aux's ContentShuffleDetector after `numpy.random.seed(seed)`.
"""

import cv2
import numpy as np
from cv2.typing import MatLike

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels


def shuffle(picture: Pixels, *, f: int, seed: int) -> Pixels:
    """The picture (H, W, 3), each pixel taken from where two smooth noises say: one for x, one for y."""
    height, width = picture.shape[:2]
    random = np.random.RandomState(seed)
    from_x = _smooth_noise(random, height, width, f) * float(width - 1)
    from_y = _smooth_noise(random, height, width, f) * float(height - 1)
    return cv2.remap(picture, from_x.astype(np.float32), from_y.astype(np.float32), cv2.INTER_LINEAR)


def _smooth_noise(random: "np.random.RandomState", height: int, width: int, cell_px: int) -> MatLike:
    """Noise (H, W) float64, 0 to 1: a random value every `cell_px` pixels, cubic between them. 0 if all are equal."""
    coarse = random.uniform(low=0, high=1, size=(height // cell_px + 2, width // cell_px + 2, 1))
    fine = cv2.resize(coarse, (width + 2 * cell_px, height + 2 * cell_px), interpolation=cv2.INTER_CUBIC)
    noise = fine[cell_px : cell_px + height, cell_px : cell_px + width]
    np.subtract(noise, noise.min(), out=noise)
    if (highest := noise.max()) > 0:
        np.divide(noise, highest, out=noise)
    return noise


SHUFFLE = Annotator(
    id="shuffle",
    description="The picture's content in disorder: keeps colours and style, not shapes",
    apply=shuffle,
    controlnets=("shuffle",),
    parameters=(
        Parameter(
            name="f", default=256, minimum=1, maximum=1024, description="How many pixels apart the disorder's waves are"
        ),
        Parameter(name="seed", default=0, minimum=0, maximum=2**32 - 1, description="The same seed, the same disorder"),
    ),
)
