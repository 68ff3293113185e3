"""Ours against controlnet_aux, bit by bit, at a size that its own resizing leaves alone (multiples of 64)."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.preprocessor.registry import core
from tests.fakes.controlnet_aux_reference import detector
from tests.fakes.synthetic_images import scene

PHOTOS = Path(__file__).parents[3] / "demo" / "photos"
IMAGES = ["synthetic", "flat", "coffee.jpg", "cat.jpg", "rocket.jpg"]


@pytest.fixture(params=IMAGES)
def image(request) -> np.ndarray:
    if request.param == "synthetic":
        return scene(384, 256)
    if request.param == "flat":
        return np.full((64, 128, 3), 90, np.uint8)
    return np.asarray(Image.open(PHOTOS / request.param).convert("RGB").resize((320, 256)))


def ours(annotator: str, image: np.ndarray, **parameters: object) -> np.ndarray:
    """With every other parameter at its default, as RGB."""
    chosen = core().get(annotator)
    control = chosen(image, **({p.name: p.default for p in chosen.parameters} | parameters))
    return np.asarray(Image.fromarray(control).convert("RGB"))


def resolution(image: np.ndarray) -> dict[str, int]:
    return {"detect_resolution": min(image.shape[:2]), "image_resolution": min(image.shape[:2])}


@pytest.mark.parametrize(("low", "high"), [(100, 200), (40, 90), (250, 30), (0, 0), (2040, 2040)])
def test_canny_is_bit_identical(image, low, high):
    reference = detector("canny", "CannyDetector")(
        image, low_threshold=low, high_threshold=high, output_type="np", **resolution(image)
    )
    assert np.array_equal(ours("canny", image, low_threshold=low, high_threshold=high), reference)


@pytest.mark.parametrize(("f", "seed"), [(256, 0), (256, 2**32 - 1), (64, 7), (31, 8), (1, 1)])
def test_shuffle_is_bit_identical_to_the_reference_under_the_same_seed(image, f, seed):
    np.random.seed(seed)  # the reference draws from the global state
    reference = detector("shuffle", "ContentShuffleDetector")(image, f=f, output_type="np", **resolution(image))
    assert np.array_equal(ours("shuffle", image, f=f, seed=seed), reference)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
@pytest.mark.parametrize(("sigma", "threshold"), [(6.0, 8), (2.5, 3), (20.0, 40), (6.0, 255)])
def test_lineart_standard_is_bit_identical(image, sigma, threshold):
    reference = detector("lineart_standard", "LineartStandardDetector")(
        image,
        guassian_sigma=sigma,
        intensity_threshold=threshold,
        detect_resolution=min(image.shape[:2]),
        output_type="np",
    )
    assert np.array_equal(
        ours("lineart_standard", image, gaussian_sigma=sigma, intensity_threshold=threshold), reference
    )
