"""Annotators whose map is the image itself, filtered: tile, blur, invert, threshold, shuffle, ip2p and inpaint."""

import cv2
import numpy as np
from cv2.typing import MatLike

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels


def tile(image: Pixels, *, down_sampling_rate: float) -> Pixels:
    """(H, W, 3) uint8: the image scaled down by the rate and back up. At rate 1 it is returned unchanged."""
    height, width = image.shape[:2]
    small = (max(1, int(width / down_sampling_rate)), max(1, int(height / down_sampling_rate)))
    if small == (width, height):
        return image
    coarse = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def blur_gaussian(image: Pixels, *, sigma: float) -> Pixels:
    """(H, W, 3) uint8, blurred; `sigma` in pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


def invert(image: Pixels) -> Pixels:
    """(H, W, 3) uint8: 255 minus the image."""
    return cv2.bitwise_not(image)


def threshold(image: Pixels, *, threshold: int) -> Pixels:
    """(H, W) uint8, of an image (H, W, 3): 255 where every channel is above the threshold, otherwise 0."""
    red, green, blue = cv2.split(image)
    darkest = cv2.min(cv2.min(red, green), blue)
    return cv2.threshold(darkest, threshold, 255, cv2.THRESH_BINARY)[1]


def shuffle(image: Pixels, *, f: int, seed: int) -> Pixels:
    """(H, W, 3) uint8: each pixel is taken from a place given by two smooth noise fields, one for x and one for y.

    The map equals that of controlnet_aux's ContentShuffleDetector after `numpy.random.seed(seed)`.
    """
    height, width = image.shape[:2]
    random = np.random.RandomState(seed)
    from_x = _smooth_noise(random, height, width, f) * float(width - 1)
    from_y = _smooth_noise(random, height, width, f) * float(height - 1)
    return cv2.remap(image, from_x.astype(np.float32), from_y.astype(np.float32), cv2.INTER_LINEAR)


def _smooth_noise(random: "np.random.RandomState", height: int, width: int, cell_px: int) -> MatLike:
    """(H, W) float64, 0 to 1: a random value every `cell_px` pixels, cubic between them. 0 if all are equal."""
    coarse = random.uniform(low=0, high=1, size=(height // cell_px + 2, width // cell_px + 2, 1))
    fine = cv2.resize(coarse, (width + 2 * cell_px, height + 2 * cell_px), interpolation=cv2.INTER_CUBIC)
    noise = fine[cell_px : cell_px + height, cell_px : cell_px + width]
    np.subtract(noise, noise.min(), out=noise)
    if (highest := noise.max()) > 0:
        np.divide(noise, highest, out=noise)
    return noise


def ip2p(image: Pixels) -> Pixels:
    """(H, W, 3): the image itself, unchanged."""
    return image


def inpaint(image: Pixels, *, threshold: int) -> Pixels:
    """(H, W, 4) uint8, of an image (H, W, 4): opaque where alpha is above the threshold, otherwise 0 in all channels.

    A transparent pixel stands for the -1 by which the inpaint ControlNet recognizes a missing pixel.
    """
    is_kept = image[:, :, 3] > threshold
    return np.where(is_kept[:, :, None], image | np.array([0, 0, 0, 255], np.uint8), np.uint8(0))


TILE = Annotator(
    id="tile",
    description="The image itself, optionally with less detail",
    apply=tile,
    controlnets=("tile",),
    parameters=(
        Parameter(
            name="down_sampling_rate",
            default=1.0,
            minimum=1,
            maximum=64,
            description="The factor by which each side is scaled down and back up; 8 is three steps of a pyramid",
        ),
    ),
)

BLUR_GAUSSIAN = Annotator(
    id="blur_gaussian",
    description="The image, blurred",
    apply=blur_gaussian,
    controlnets=("tile",),
    parameters=(
        Parameter(name="sigma", default=9.0, minimum=0.01, maximum=64, description="Width of the blur, in pixels"),
    ),
)

INVERT = Annotator(
    id="invert",
    description="The image with light and dark exchanged, such as for lines drawn in black on white",
    apply=invert,
    controlnets=("canny", "lineart", "lineart_anime", "mlsd", "scribble", "softedge"),
)

THRESHOLD = Annotator(
    id="threshold",
    description="White where the image is light in every channel, black elsewhere",
    apply=threshold,
    controlnets=("scribble",),
    is_bilevel=True,
    parameters=(
        Parameter(name="threshold", default=127, minimum=0, maximum=255, description="Lighter pixels become white"),
    ),
)

SHUFFLE = Annotator(
    id="shuffle",
    description="The image's content shuffled: keeps colors and style, not shapes",
    apply=shuffle,
    controlnets=("shuffle",),
    parameters=(
        Parameter(
            name="f",
            default=256,
            minimum=1,
            maximum=1024,
            description="The distance between the waves that move pixels, in pixels",
        ),
        Parameter(
            name="seed", default=0, minimum=0, maximum=2**32 - 1, description="The same seed gives the same shuffle"
        ),
    ),
)

IP2P = Annotator(
    id="ip2p",
    description="The image itself, for ControlNets that follow an instruction",
    apply=ip2p,
    controlnets=("ip2p", "shuffle"),
)

INPAINT = Annotator(
    id="inpaint",
    description="The image with its transparent parts removed, to be filled in",
    apply=inpaint,
    controlnets=("inpaint",),
    keeps_alpha=True,
    has_labels=True,
    parameters=(
        Parameter(name="threshold", default=127, minimum=0, maximum=254, description="More opaque pixels are kept"),
    ),
)
