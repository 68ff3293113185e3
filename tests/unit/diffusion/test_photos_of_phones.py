"""AVIF and HEIC as images, masks and control images of a generation."""

from pathlib import Path

import pytest
from PIL import Image

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField
from services.diffusion.parse.images import decode_with_hole, sources
from services.kernel.images import ImageLimits
from tests.fakes.synthetic_images import saved

HEIC = Path(__file__).parents[2] / "golden" / "heic"
LIMITS = ImageLimits()


def source(data: bytes) -> common_pb2.ImageSource:
    return common_pb2.ImageSource(data=data)


def test_a_heic_is_the_image_and_an_avif_its_mask():
    mask = saved(Image.linear_gradient("L").resize((64, 96)), "AVIF", quality=100)
    own = sources(
        diffusion_pb2.GenerateRequest(image=source((HEIC / "turned.heic").read_bytes()), mask=source(mask)), LIMITS
    )
    assert own.image is not None
    assert own.mask is not None
    assert own.image.size == own.mask.size == (64, 96)
    assert own.mask.convert("L").getpixel((30, 2)) < 20
    assert own.mask.convert("L").getpixel((30, 93)) > 235


def test_the_transparent_part_of_a_heic_is_the_hole():
    image, hole = decode_with_hole(source((HEIC / "alpha.heic").read_bytes()), "image", LIMITS)
    assert image.size == (96, 64)
    assert hole is not None
    assert (hole.getpixel((10, 32)), hole.getpixel((80, 32))) == (255, 0)


@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_cut_heic_names_its_field(field):
    cut = source((HEIC / "plain.heic").read_bytes()[:400])
    whole = source((HEIC / "plain.heic").read_bytes())
    with pytest.raises(InvalidField, match="damaged or truncated") as refused:
        sources(diffusion_pb2.GenerateRequest(**{"image": whole, "mask": whole, field: cut}), LIMITS)
    assert refused.value.field == field
