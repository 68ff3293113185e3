"""What every annotator promises, and the maps of those that have no reference."""

import inspect

import cv2
import numpy as np
import pytest

from services.preprocessor.annotator import Annotator
from services.preprocessor.registry import Registry, core
from tests.fakes.synthetic_images import scene

# Only `inpaint` takes transparency; its own test is below.
ANNOTATORS = [annotator for annotator in core() if not annotator.keeps_alpha]
SHAPES = [(1, 1), (1, 5000), (5000, 1), (2, 3), (67, 45)]
every_annotator = pytest.mark.parametrize("annotator", ANNOTATORS, ids=lambda annotator: annotator.id)


def defaults(annotator: Annotator) -> dict[str, object]:
    return {parameter.name: parameter.default for parameter in annotator.parameters}


def apply(annotator_id: str, image: np.ndarray, **parameters: object) -> np.ndarray:
    annotator = core().get(annotator_id)
    return annotator(image, **(defaults(annotator) | parameters))


@every_annotator
@pytest.mark.parametrize(("width_px", "height_px"), SHAPES)
@pytest.mark.filterwarnings("error")
def test_a_map_has_the_size_of_its_image_whatever_its_shape(annotator, width_px, height_px):
    control = annotator(scene(width_px, height_px), **defaults(annotator))
    assert control.dtype == np.uint8
    assert control.shape in ((height_px, width_px), (height_px, width_px, 3))


@every_annotator
@pytest.mark.filterwarnings("error")
def test_both_ends_of_every_range_work(annotator):
    image = scene(96, 64)
    for parameter in annotator.parameters:
        for value in (parameter.minimum, parameter.maximum):
            if value is not None:
                chosen = defaults(annotator) | {parameter.name: type(parameter.default)(value)}
                assert annotator(image, **chosen).shape[:2] == image.shape[:2]


@every_annotator
@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.filterwarnings("error")
def test_a_flat_image_gives_a_flat_map(annotator, level):
    control = annotator(np.full((32, 48, 3), level, np.uint8), **defaults(annotator))
    assert control.min() == control.max()


@every_annotator
def test_the_same_input_gives_the_same_map_and_leaves_the_image_alone(annotator):
    image = scene()
    first, second = (annotator(image, **defaults(annotator)) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(image, scene())


@every_annotator
def test_the_number_of_threads_does_not_show_in_the_map(annotator):
    image = scene(640, 480)
    usual = cv2.getNumThreads()
    maps = []
    for threads in (1, 4):
        cv2.setNumThreads(threads)
        maps.append(annotator(image, **defaults(annotator)))
    cv2.setNumThreads(usual)
    assert np.array_equal(*maps)


@every_annotator
def test_the_described_parameters_are_those_of_apply(annotator):
    taken = list(inspect.signature(annotator.apply).parameters)[1:]
    assert [parameter.name for parameter in annotator.parameters] == taken


@every_annotator
def test_an_annotator_describes_itself(annotator):
    assert annotator.description
    assert annotator.license == "Apache-2.0"
    assert annotator.controlnets
    assert annotator.version.startswith("4+opencv-")
    assert all(parameter.description for parameter in annotator.parameters)


def test_the_core_set_is_complete():
    expected = "canny shuffle lineart_standard scribble_xdog lsd invert threshold tile blur_gaussian ip2p inpaint"
    assert [annotator.id for annotator in core()] == expected.split()


def test_two_annotators_with_one_id_are_an_error():
    with pytest.raises(AssertionError):
        Registry([ANNOTATORS[0], ANNOTATORS[0]])


def test_gray_canny_uses_brightness_alone():
    # Red beside a gray of the same brightness: an edge in color, none in brightness.
    image = np.full((32, 32, 3), 76, np.uint8)
    image[:, 16:] = (255, 0, 0)
    assert apply("canny", image, gray=False).any()
    assert not apply("canny", image, gray=True).any()


def test_another_seed_shuffles_differently():
    image = scene()
    assert not np.array_equal(apply("shuffle", image, seed=1), apply("shuffle", image, seed=2))


def test_shuffled_pixels_come_from_the_image():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = (200, 100, 50)
    shuffled = apply("shuffle", image)
    assert shuffled.max(axis=(0, 1)).tolist() == [200, 100, 50]
    assert shuffled.min() == 0


def test_invert_inverts():
    assert np.array_equal(apply("invert", scene()), 255 - scene())


def test_threshold_checks_every_channel():
    image = np.array([[[128, 128, 128], [127, 255, 255], [255, 255, 127], [255, 255, 255]]], np.uint8)
    assert apply("threshold", image).tolist() == [[255, 0, 0, 255]]
    assert apply("threshold", image, threshold=255).tolist() == [[0, 0, 0, 0]]


def test_tile_keeps_an_image_at_rate_1_and_removes_detail_above():
    image = scene()
    assert np.array_equal(apply("tile", image), image)
    coarse = apply("tile", image, down_sampling_rate=8.0)
    assert 0 < _detail(coarse) < _detail(image) / 2
    assert abs(coarse.mean() - image.mean()) < 2


def test_a_wider_blur_removes_more_detail():
    image = scene()
    assert _detail(apply("blur_gaussian", image, sigma=9.0)) < _detail(apply("blur_gaussian", image, sigma=2.0))
    assert np.array_equal(apply("blur_gaussian", image, sigma=0.01), image)


def _detail(image: np.ndarray) -> float:
    return float(np.abs(np.diff(image.astype(int), axis=1)).mean())


def test_scribbles_follow_dark_lines_on_light_ground():
    image = np.full((64, 64, 3), 240, np.uint8)
    image[30:33] = 10
    strokes = apply("scribble_xdog", image)
    assert set(np.unique(strokes)) == {0, 255}
    assert strokes[31].all()
    assert not strokes[:20].any()
    assert not apply("scribble_xdog", 255 - image)[31].any()


def test_a_higher_threshold_gives_fewer_scribbles():
    image = scene()
    assert apply("scribble_xdog", image, threshold=64).sum() < apply("scribble_xdog", image, threshold=4).sum()


def test_scribbles_equal_the_formula_on_all_channels_at_once():
    image = scene()
    near, far = (cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma) for sigma in (0.5, 5.0))
    expected = (far - near).min(axis=2) > 16
    assert np.array_equal(apply("scribble_xdog", image) == 255, expected)


def test_inpaint_keeps_opaque_pixels_and_removes_the_others():
    image = np.dstack([scene(4, 2), np.array([[255, 128, 127, 0], [255, 255, 0, 0]], np.uint8)])
    control = apply("inpaint", image)
    assert control[:, :, 3].tolist() == [[255, 255, 0, 0], [255, 255, 0, 0]]
    assert np.array_equal(control[:, :2, :3], image[:, :2, :3])
    assert not control[:, 2:].any()
    assert apply("inpaint", image, threshold=0)[0, 2, 3] == 255


def test_lsd_draws_long_lines_and_leaves_short_ones():
    image = np.full((64, 64, 3), 20, np.uint8)
    image[:, 20:] = 230
    assert apply("lsd", image).any()
    assert not apply("lsd", image, minimum_length=4096.0).any()
