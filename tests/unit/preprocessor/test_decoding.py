"""From bytes to pixels: the fast path for JPEGs gives exactly Pillow's pixels and refuses what Pillow refuses."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fanlight.errors import InvalidField, TooLarge
from services.kernel.images import ImageLimits, decode_rgb
from services.preprocessor.codec import decode
from tests.fakes.synthetic_images import saved, scene

HEIC = Path(__file__).parents[2] / "golden" / "heic"
LIMITS = ImageLimits(pixels=100_000, side_px=1_000)


def jpeg(width: int = 67, height: int = 45, mode: str = "RGB", **options: object) -> bytes:
    return saved(Image.fromarray(scene(width, height)).convert(mode), "JPEG", **options)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        jpeg(quality=20, subsampling=2),
        jpeg(quality=95, subsampling=1),
        jpeg(progressive=True),
        jpeg(1, 1),
        jpeg(mode="L"),
        jpeg(mode="CMYK"),
        turned(),
        jpeg() + b"more",
        saved(Image.fromarray(scene()), "PNG"),
        saved(Image.fromarray(scene()), "AVIF"),
        saved(Image.fromarray(scene()), "AVIF") + b"\xff\xd9",
        (HEIC / "turned.heic").read_bytes(),
    ],
    ids=[
        *("usual", "coarse", "422", "progressive", "1x1", "gray", "cmyk", "turned", "trailing", "png"),
        *("avif", "avif that ends as a jpeg", "heic"),
    ],
)
def test_pixels_are_pillows(data):
    expected = np.asarray(decode_rgb(data, field="image", limits=LIMITS))
    assert np.array_equal(decode(data, keeps_alpha=False, limits=LIMITS), expected)


def with_segment(data: bytes, segment: bytes, *, before: bytes) -> bytes:
    at = data.index(before)
    return data[:at] + segment + data[at:]


EXIF = turned()[turned().index(b"\xff\xe1") :]
TURN = EXIF[: 2 + int.from_bytes(EXIF[2:4], "big")]
# A segment that declares the three channels to be RGB, not YCbCr.
ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


@pytest.mark.parametrize("segment", [TURN, ADOBE_RGB], ids=["turned", "adobe"])
@pytest.mark.parametrize("before", [b"\xff\xc0", b"\xff\xda"], ids=["before the frame", "after the frame"])
def test_orientation_and_colors_of_a_jpeg_count_wherever_they_stand(segment, before):
    # Without JFIF's segment, which would override the colors of the others.
    bare = jpeg()[:2] + jpeg()[20:]
    data = with_segment(bare, segment, before=before)
    expected = np.asarray(decode_rgb(data, field="image", limits=LIMITS))
    assert not np.array_equal(expected, decode(bare, keeps_alpha=False, limits=LIMITS))
    assert np.array_equal(decode(data, keeps_alpha=False, limits=LIMITS), expected)


@pytest.mark.parametrize("data", [jpeg()[:-40], jpeg()[:200], jpeg()[:20] + b"\xff\xd9", b"\xff\xd8\xff\xd9"])
def test_a_truncated_jpeg_is_refused(data):
    with pytest.raises(InvalidField) as raised:
        decode(data, keeps_alpha=False, limits=LIMITS)
    assert raised.value.field == "image"


@pytest.mark.parametrize(("width", "height"), [(1_001, 1), (400, 400)])
def test_a_jpeg_that_is_too_large_is_refused_by_its_header(width, height):
    with pytest.raises(TooLarge):
        decode(jpeg(width, height), keeps_alpha=False, limits=LIMITS)


@pytest.mark.parametrize("keeps_alpha", [False, True])
def test_transparency_of_a_heic_is_kept_on_request(keeps_alpha):
    pixels = decode((HEIC / "alpha.heic").read_bytes(), keeps_alpha=keeps_alpha, limits=LIMITS)
    assert pixels.shape == (64, 96, 4 if keeps_alpha else 3)
    assert (pixels[32, 10] == 0).all() if keeps_alpha else (pixels[32, 10] == 255).all()


def test_transparency_is_kept_on_request():
    image = Image.fromarray(scene(8, 8)).convert("RGBA")
    image.putalpha(100)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    assert (decode(stream.getvalue(), keeps_alpha=True, limits=LIMITS)[:, :, 3] == 100).all()
    assert (decode(jpeg(), keeps_alpha=True, limits=LIMITS)[:, :, 3] == 255).all()
