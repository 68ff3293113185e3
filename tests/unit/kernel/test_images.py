"""Every image comes out upright, in RGB and at its size, or as an error that says what is wrong with it."""

import contextlib
import random

import numpy as np
import pytest
from PIL import Image

from fanlight.errors import FanlightError, InvalidField, TooLarge
from services.kernel.images import ImageLimits, decode_rgb
from tests.fakes.broken_images import exif_that_is_broken, huge_gif, huge_png, png_16_bit_rgb
from tests.fakes.synthetic_images import encoded, saved, scene

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

LIMITS = ImageLimits(size_bytes=1_000_000, pixels=100_000, side_px=5_000)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def decode(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray:
    image = decode_rgb(data, field="image", limits=limits)
    assert image.mode == "RGB"
    return np.asarray(image)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 3)])
def test_a_image_of_any_kind_and_shape_keeps_its_size(kind, size):
    assert decode(encoded(scene(*size), kind)).shape == (size[1], size[0], 3)


def test_pixels_are_not_changed_on_the_way():
    assert np.array_equal(decode(encoded(scene())), scene())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_image_is_turned_as_its_exif_says(kind, orientation):
    upright = scene(48, 32)
    # What a camera would have stored, by the definition of the tag.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    data = encoded(np.ascontiguousarray(stored), kind, lossless=True, exif=exif(orientation))
    assert np.array_equal(decode(data), upright)


@pytest.mark.parametrize("block", [exif_that_is_broken(), b"Exif\x00\x00II", b"Exif\x00\x00garbage", b"no exif at all"])
def test_a_broken_exif_block_is_ignored(block):
    assert decode(encoded(scene(48, 32), "JPEG", exif=block)).shape == (32, 48, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    assert decode(encoded(scene(48, 32), "PNG", exif=exif(orientation))).shape == (32, 48, 3)


def test_transparency_is_put_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[0, :, 3] = 255
    pixels[1, :, 3] = (0, 128)
    assert decode(encoded(pixels)).tolist() == [[[255, 0, 0]] * 2, [[255, 255, 255], [255, 127, 127]]]


def test_a_palette_with_a_transparent_color_is_put_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, *RED])
    image.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        data = saved(image, kind, transparency=0)
        assert decode(data).tolist() == [[list(WHITE), list(RED)]]


def test_one_bit_with_transparency_is_put_on_white():
    assert decode(saved(Image.new("1", (2, 2), 0), "PNG", transparency=0)).min() == 255


def test_16_bits_are_scaled_to_8():
    grey = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    assert decode(encoded(grey))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decode(png_16_bit_rgb((65_535, 32_896, 0)))[0, 0].tolist() == [255, 128, 0]


def test_cmyk_becomes_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decode(saved(red, "JPEG"))[0, 0].astype(int) - RED).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_image_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, WHITE)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert decode(data)[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"%PDF-1.7", b"\x00" * 64, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_bytes_that_are_not_an_image_are_refused(data):
    with pytest.raises(InvalidField) as raised:
        decode(data)
    assert raised.value.field == "image"


def test_floating_point_pixels_are_refused():
    with pytest.raises(InvalidField):
        decode(encoded(np.zeros((4, 4), np.float32), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_image_is_refused(kind):
    data = encoded(scene(), kind)
    with pytest.raises(InvalidField, match="damaged or truncated"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [huge_png(), huge_gif(), huge_png(5_001, 1), huge_png(400, 251)])
def test_more_pixels_than_the_limits_are_refused_from_the_header(data):
    with pytest.raises(TooLarge) as raised:
        decode(data)
    assert raised.value.field == "image"


def test_the_limits_themselves_are_taken():
    assert decode(encoded(scene(400, 250))).shape == (250, 400, 3)
    assert decode(encoded(scene(5_000, 1))).shape == (1, 5_000, 3)


def test_more_bytes_than_the_limit_are_refused():
    data = encoded(scene())
    with pytest.raises(TooLarge):
        decode(data, ImageLimits(size_bytes=len(data) - 1))
    assert decode(data, ImageLimits(size_bytes=len(data))).shape == scene().shape


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_bytes_give_a_image_or_one_of_our_errors(kind):
    sound = encoded(scene(32, 24), kind, **({} if kind in ("GIF", "BMP") else {"exif": exif(6)}))
    dice = random.Random(kind)
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(dice.choice((1, 2, 8))):
            data[dice.randrange(min(len(data), dice.choice((64, 10_000))))] = dice.randrange(256)
        with contextlib.suppress(FanlightError):
            decode(bytes(data))
