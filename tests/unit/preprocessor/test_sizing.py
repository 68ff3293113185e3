"""How large a control image is, how an image is made to fit, and where an annotator works."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from fanlight.contract.parameters import fill
from fanlight.errors import TooLarge
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation, AnnotationResult, annotate
from services.preprocessor.annotator import ControlMap
from services.preprocessor.poses import Keypoint, Person
from services.preprocessor.registry import core
from services.preprocessor.sizing import WORKING_PIXELS_MAX, WORKING_SIDE_MAX_PX, working_size
from tests.fakes.synthetic_images import decoded, encoded, scene

LIMITS = ImageLimits(pixels=1_000_000, side_px=5_000)


def annotated(
    annotator_id: str, image: np.ndarray, size: tuple[int, int] | None = None, **parameters: object
) -> AnnotationResult:
    annotator = core().get(annotator_id)
    values = fill(annotator.all_parameters, parameters)
    asked = Annotation(annotator=annotator, parameters=values, image=encoded(image), size=size)
    return annotate(asked, limits=LIMITS)


def test_an_image_is_stretched_to_a_size_by_default():
    control = annotated("ip2p", scene(200, 100), (50, 50))
    assert (control.width_px, control.height_px) == (50, 50)
    assert decoded(control.data).any(axis=2).all()


def test_crop_keeps_the_middle_at_the_requested_aspect():
    image = scene(200, 100)
    control = annotated("ip2p", image, (100, 100), resize_mode="crop")
    assert np.array_equal(decoded(control.data), image[:, 50:150])


def test_pad_borders_the_map_with_black_and_never_the_image():
    image = np.full((50, 100, 3), 200, np.uint8)
    control = decoded(annotated("ip2p", image, (100, 100), resize_mode="pad").data)
    assert (control[25:75] == 200).all()
    assert not control[:25].any()
    assert not control[75:].any()
    # If the image were padded before it is annotated, the padding would be an edge.
    assert not decoded(annotated("canny", image, (100, 100), resize_mode="pad").data).any()


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(200, 100, (100, 50)), (30, 60, (50, 100)), (7, 7, (50, 50))]
)
def test_a_short_side_keeps_the_aspect(width, height, expected):
    control = annotated("ip2p", scene(width, height), short_side_px=50)
    assert (control.width_px, control.height_px) == expected


def test_a_short_side_above_the_limits_is_refused_by_its_name():
    with pytest.raises(TooLarge) as raised:
        annotated("ip2p", scene(1, 100), short_side_px=4_000)
    assert raised.value.field == "parameters.short_side_px"


def test_the_resolution_it_works_at_does_not_change_the_size_of_the_map():
    fine, coarse = (annotated("canny", scene(200, 130), detect_resolution=side) for side in (0, 64))
    assert (fine.width_px, fine.height_px) == (coarse.width_px, coarse.height_px) == (200, 130)
    assert fine.data != coarse.data
    # A map that was enlarged has grays; they must be kept.
    assert len(np.unique(decoded(coarse.data))) > 2


@pytest.mark.parametrize(
    ("inner", "short_px", "expected"),
    [
        ((512, 512), 512, (512, 512)),
        ((300, 200), 512, (768, 512)),
        ((300, 200), 0, (300, 200)),
        ((1, 1), 512, (512, 512)),
        ((100, 101), 10, (64, 64)),
    ],
)
def test_an_annotator_works_at_multiples_of_64(inner, short_px, expected):
    assert working_size(inner, short_px, aligned=False) == expected


@pytest.mark.parametrize(
    ("inner", "expected"),
    [((513, 37), (512, 64)), ((1, 1), (64, 64)), ((768, 512), (768, 512)), ((16_384, 2), (8_192, 64))],
)
def test_an_aligned_size_rounds_an_images_own_size_too_and_bounds_it(inner, expected):
    assert working_size(inner, 0, aligned=True) == expected
    assert np.prod(working_size((16_384, 2_400), 0, aligned=True)) <= 1.1 * WORKING_PIXELS_MAX


@pytest.mark.parametrize("inner", [(1, 5_000), (5_000, 1), (16_384, 2_000)])
def test_the_working_size_is_bounded_for_any_image(inner):
    width, height = working_size(inner, 4_096, aligned=True)
    assert width >= 64
    assert height >= 64
    assert width * height <= 1.1 * WORKING_PIXELS_MAX
    assert max(width, height) <= WORKING_SIDE_MAX_PX


def test_poses_are_in_pixels_of_the_control_image_inside_and_beside_the_png():
    person = Person(body=(Keypoint(x=0.5, y=0.25, score=0.75), *[None] * 17))

    class Finder:
        device = "cpu/float32"

        def draw(self, annotation, image):
            return ControlMap(pixels=image, people=(person,))

    annotator = core().get("ip2p")
    values = fill(annotator.all_parameters, {"resize_mode": "pad"})
    asked = Annotation(annotator=annotator, parameters=values, image=encoded(scene(200, 100)), size=(100, 100))
    control = annotate(asked, limits=LIMITS, runner=Finder())
    pose = json.loads(control.pose_json)
    assert pose["people"][0]["pose_keypoints_2d"][:6] == [50, 37.5, 0.75, 0, 0, 0]
    assert (pose["canvas_width"], pose["canvas_height"]) == (100, 100)
    assert Image.open(io.BytesIO(control.data)).text["openpose"] == control.pose_json
    assert control.device == "cpu/float32"
