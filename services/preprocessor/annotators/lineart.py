"""Line art without a network. The same map as controlnet_aux's LineartStandardDetector."""

import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.annotators.strokes import darkness

# A picture whose lines are fainter than this is not stretched to full contrast.
MEDIAN_FLOOR = 16


def lineart_standard(picture: Pixels, *, gaussian_sigma: float, intensity_threshold: int) -> Pixels:
    """Lines (H, W), white on black; the median line is 127."""
    intensity = darkness(picture, near_sigma=0, far_sigma=gaussian_sigma)
    np.clip(intensity, 0, 255, out=intensity)
    lines = intensity[intensity > intensity_threshold]
    np.divide(intensity, max(MEDIAN_FLOOR, np.median(lines) if lines.size else 0), out=intensity)
    np.multiply(intensity, 127, out=intensity)
    return np.clip(intensity, 0, 255, out=intensity).astype(np.uint8)


def line_parameters(*, gaussian_sigma: float, intensity_threshold: int) -> tuple[Parameter, ...]:
    """With these defaults."""
    return (
        Parameter(
            name="gaussian_sigma",
            default=gaussian_sigma,
            minimum=0.1,
            maximum=64,
            description="How far around a pixel its surroundings reach, in pixels",
        ),
        Parameter(
            name="intensity_threshold",
            default=intensity_threshold,
            minimum=0,
            maximum=255,
            description="How much darker than its surroundings a pixel is that counts when the contrast is set",
        ),
    )


LINEART_STANDARD = Annotator(
    id="lineart_standard",
    description="Lines of drawings and photographs, white on black",
    apply=lineart_standard,
    controlnets=("lineart",),
    parameters=line_parameters(gaussian_sigma=6.0, intensity_threshold=8),
)
