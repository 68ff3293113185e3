"""Sizes, their bounds and classes."""

import pytest

from fanlight.contract import annotation
from fanlight.contract.limits import IMPLIED_PIXELS_LIMIT, check_size, size_class, size_of_source, size_step_px
from fanlight.errors import InvalidField


@pytest.mark.parametrize("size", [(0, 0, 8), (64, 64, 64), (2048, 2048, 8), (65, 67, 0), (72, 80, 8)])
def test_a_right_size_is_taken(size):
    check_size(*size)


@pytest.mark.parametrize(
    ("size", "field", "says"),
    [
        ((64, 0), "height_px", "both sides or none"),
        ((0, 64), "width_px", "both sides or none"),
        ((63, 64), "width_px", "is 63; must be 64 to 2048$"),
        ((64, 2049), "height_px", "is 2049; must be 64 to 2048$"),
        ((64, 68, 8), "height_px", "is 68; must be 64 to 2048 and a multiple of 8$"),
    ],
)
def test_a_wrong_size_names_its_side(size, field, says):
    with pytest.raises(InvalidField, match=says) as caught:
        check_size(*size)

    assert caught.value.field == field


def test_a_control_image_may_have_other_sizes():
    annotation.check_size(16, 8192)
    annotation.check_size(0, 0)
    with pytest.raises(InvalidField, match="16 to 8192"):
        annotation.check_size(16, 8193)


def test_a_model_that_announces_no_step_has_8():
    assert (size_step_px(0), size_step_px(64)) == (8, 64)


def test_sizes_of_about_as_many_pixels_are_of_one_class():
    assert size_class(512, 512) == size_class(448, 576) == 18
    assert size_class(64, 64) == 12
    assert size_class(2048, 2048) == 22
    assert size_class(0, 0) == 0


@pytest.mark.parametrize(
    ("image", "step_px", "size"),
    [
        ((99, 65), 2, (98, 64)),
        ((512, 768), 8, (512, 768)),
        ((1024, 1024), 8, (1024, 1024)),
        ((4000, 3000), 8, (1176, 880)),
        ((4000, 1000), 64, (2048, 512)),
        ((16_384, 16), 8, (2048, 64)),
        ((1, 1), 24, (72, 72)),
        ((3000, 1), 512, (2048, 512)),
    ],
)
def test_an_image_implies_a_size_that_every_worker_understands(image, step_px, size):
    assert size_of_source(*image, step_px) == size
    check_size(*size, step_px)
    assert size[0] * size[1] <= IMPLIED_PIXELS_LIMIT
