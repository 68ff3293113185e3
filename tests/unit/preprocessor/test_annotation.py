"""From encoded image to encoded control image."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from fanlight.errors import Cancelled, InvalidField, TooLarge
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation, annotate
from services.preprocessor.registry import core
from services.preprocessor.sizing import check_size
from tests.fakes.broken_images import huge_png
from tests.fakes.synthetic_images import decoded, encoded, saved, scene

LIMITS = ImageLimits(pixels=1_000_000, side_px=5_000)


def annotation(image: bytes, annotator_id: str = "canny", size: tuple[int, int] | None = None) -> Annotation:
    annotator = core().get(annotator_id)
    values = {parameter.name: parameter.default for parameter in annotator.parameters}
    return Annotation(annotator=annotator, parameters=values, image=image, size=size)


@pytest.mark.parametrize("annotator", [each for each in core() if not each.keeps_alpha], ids=lambda each: each.id)
def test_the_control_image_is_the_annotators_map(annotator):
    image = scene()
    asked = annotation(encoded(image), annotator.id)
    control = annotate(asked, limits=LIMITS)
    expected = Image.fromarray(annotator(image, **asked.parameters)).convert("RGB")
    assert np.array_equal(decoded(control.data), np.asarray(expected))
    assert (control.width_px, control.height_px) == (192, 128)


@pytest.mark.parametrize(
    ("annotator", "mode"), [("canny", "1"), ("lineart_standard", "L"), ("shuffle", "RGB"), ("inpaint", "RGBA")]
)
def test_a_map_is_written_with_no_more_channels_and_bits_than_it_has(annotator, mode):
    control = annotate(annotation(encoded(scene()), annotator), limits=LIMITS)
    assert Image.open(io.BytesIO(control.data)).mode == mode


@pytest.mark.parametrize("size", [(64, 64), (400, 100), (1, 1), (500, 700)])
def test_lines_are_drawn_at_the_requested_size(size):
    control = annotate(annotation(encoded(scene()), size=size), limits=LIMITS)
    assert (control.width_px, control.height_px) == size
    pixels = decoded(control.data)
    assert pixels.shape == (size[1], size[0], 3)
    # A map that was stretched afterwards would have grays.
    assert set(np.unique(pixels)) <= {0, 255}


def test_an_image_is_turned_upright_before_it_is_annotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = annotate(annotation(encoded(scene(), "PNG", exif=exif), "invert"), limits=LIMITS)
    assert np.array_equal(decoded(turned.data), 255 - np.rot90(scene(), -1))


def test_transparency_is_white_to_the_annotator():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    control = annotate(annotation(saved(image, "PNG"), "invert"), limits=LIMITS)
    assert decoded(control.data).max() == 0


@pytest.mark.parametrize("data", [b"", b"no image", encoded(scene())[:-400]])
def test_a_damaged_image_is_the_requests_fault(data):
    with pytest.raises(InvalidField) as raised:
        annotate(annotation(data), limits=LIMITS)
    assert raised.value.field == "image"


def test_a_huge_header_is_refused_before_it_is_decoded():
    with pytest.raises(TooLarge):
        annotate(annotation(huge_png()), limits=LIMITS)


def test_the_spans_show_the_time_of_each_step():
    clock = itertools.count(0.0, 0.25)
    control = annotate(annotation(encoded(scene())), limits=LIMITS, clock=lambda: next(clock))
    assert control.spans == (("decode", 0.25), ("annotate", 0.25), ("encode", 0.25))


@pytest.mark.parametrize("steps_done", [0, 1, 2])
def test_cancelled_work_ends_after_its_current_step(steps_done):
    calls = itertools.count()
    clock = itertools.count()

    def check_cancelled() -> None:
        if next(calls) == steps_done:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        annotate(
            annotation(encoded(scene())), limits=LIMITS, check_cancelled=check_cancelled, clock=lambda: next(clock)
        )
    assert next(clock) == 2 * steps_done


FIELDS = ("width_px", "height_px")


def test_a_size_within_the_limits_is_allowed():
    check_size((5_000, 200), LIMITS, fields=FIELDS)


@pytest.mark.parametrize(
    ("size", "field"),
    [
        ((5_001, 16), "width_px"),
        ((16, 5_001), "height_px"),
        ((2_000, 501), "width_px"),
        ((2**32 - 1, 2**32 - 1), "width_px"),
    ],
)
def test_a_size_above_the_limits_names_its_field(size, field):
    with pytest.raises(TooLarge) as raised:
        check_size(size, LIMITS, fields=FIELDS)
    assert raised.value.field == field
