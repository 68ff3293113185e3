"""Masks as people send them, their blur, and the part of an image that they are about."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw

from services.diffusion.masks import blurred, crop_region, expanded, filled, read_mask, shown, transparency
from services.kernel.images import ImageLimits, decode_rgba

SIDE_PX = 32


def half(mode: str = "L") -> Image.Image:
    """White on the left, black on the right."""
    mask = Image.new("L", (SIDE_PX, SIDE_PX), 0)
    mask.paste(255, (0, 0, SIDE_PX // 2, SIDE_PX))
    return mask.convert(mode)


def with_alpha(color: int, mode: str) -> Image.Image:
    """Strokes of one color on the left of a transparent canvas."""
    image = Image.new("LA", (SIDE_PX, SIDE_PX), (color, 0))
    image.paste((color, 255), (0, 0, SIDE_PX // 2, SIDE_PX))
    return image.convert(mode)


def in_16_bits() -> Image.Image:
    return Image.fromarray(np.asarray(half()).astype(np.uint16) * 257)


def palette_with_transparency() -> Image.Image:
    image = half("P")
    image.info["transparency"] = image.getpixel((SIDE_PX - 1, 0))
    return image


def opaque_rgba() -> Image.Image:
    return half("RGBA")


def turned() -> Image.Image:
    """Upright only as its EXIF says."""
    return half().transpose(Image.Transpose.ROTATE_90)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    image.save(out, kind, **options)
    return out.getvalue()


def read(data: bytes) -> np.ndarray:
    return np.asarray(read_mask(decode_rgba(data, field="mask", limits=ImageLimits())))


MASKS: dict[str, Callable[[], bytes]] = {
    "8 bits": lambda: encoded(half()),
    "1 bit": lambda: encoded(half("1")),
    "16 bits": lambda: encoded(in_16_bits()),
    "RGB": lambda: encoded(half("RGB")),
    "palette": lambda: encoded(half("P")),
    "palette with a transparent color": lambda: encoded(palette_with_transparency()),
    "opaque RGBA": lambda: encoded(opaque_rgba()),
    "white strokes, LA": lambda: encoded(with_alpha(255, "LA")),
    "white strokes, RGBA": lambda: encoded(with_alpha(255, "RGBA")),
    "black strokes, RGBA": lambda: encoded(with_alpha(0, "RGBA")),
    "webp with strokes": lambda: encoded(with_alpha(255, "RGBA"), "WEBP", lossless=True),
    "bmp": lambda: encoded(half(), "BMP"),
    "tiff": lambda: encoded(half(), "TIFF"),
    "gif": lambda: encoded(half(), "GIF"),
    "turned by EXIF": lambda: encoded(turned(), "PNG", exif=_exif(6)),
}


def _exif(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    return exif


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_means_the_same_in_every_form(name):
    assert np.array_equal(read(MASKS[name]()), np.asarray(half()))


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_black_and_white_are_clean_in_a_mask_that_was_a_jpeg(quality):
    values = read(encoded(half("RGB"), "JPEG", quality=quality))
    assert values[:, :8].min() == 255
    assert values[:, 24:].max() == 0


@pytest.mark.parametrize(("alpha", "value"), [(0, 0), (255, 255), (128, 255)])
def test_a_canvas_of_one_opacity_is_all_white_unless_nothing_is_painted(alpha, value):
    assert set(read(encoded(Image.new("RGBA", (4, 4), (255, 255, 255, alpha)))).flat) == {value}


def test_grays_stay_grays():
    ramp = Image.linear_gradient("L").resize((1, 256))
    values = read(encoded(ramp))[:, 0].astype(int)
    assert (values[0], values[-1]) == (0, 255)
    assert (np.diff(values) >= 0).all()
    assert abs(values[128] - 128) <= 1


def test_what_is_transparent_in_an_image_is_its_mask():
    image = Image.new("RGBA", (3, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.putpixel((2, 0), (10, 20, 30, 127))
    assert np.asarray(transparency(image)).tolist() == [[0, 255, 128]]


def square(box: tuple[int, int, int, int], size: tuple[int, int] = (96, 96)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize("deviation", [0.5, 1, 4, 7.5, 16, 40, 64])
@pytest.mark.parametrize("box", [(200, 200, 201, 201), (180, 150, 260, 210), (0, 0, 50, 400)])
def test_the_blur_ends_after_two_deviations(box, deviation):
    soft = np.asarray(blurred(square(box, (400, 400)), deviation))
    reach = round(2 * deviation)
    far = np.ones((400, 400), bool)
    far[max(0, box[1] - reach) : box[3] + reach, max(0, box[0] - reach) : box[2] + reach] = False
    assert not soft[far].any()


def test_the_blur_is_a_gaussian():
    soft = np.asarray(blurred(square((0, 0, 48, 96)), 4)).astype(int)
    kernel = np.exp(-(np.arange(-8, 9) ** 2) / 32)
    exact = [255 * kernel[place:].sum() / kernel.sum() for place in range(17)]
    assert np.abs(soft[50, 39:56] - exact).max() <= 1
    assert soft[50, :39].min() == 255
    assert soft[50, 56:].max() == 0
    assert soft[0, 20] == 255, "a mask that leaves the image does not fade at its edge"


def test_a_wide_blur_is_nearly_the_gaussian_too():
    """It is computed on a smaller copy."""
    soft = np.asarray(blurred(square((0, 0, 300, 600), (600, 600)), 40)).astype(int)[300]
    kernel = np.exp(-(np.arange(-80, 81) ** 2) / (2 * 40**2))
    exact = 255 * np.convolve(np.arange(600) < 300, kernel / kernel.sum(), mode="same")
    assert np.abs(soft - exact)[100:500].max() <= 8


def test_without_a_blur_the_mask_itself_shows():
    mask = square((20, 20, 40, 40))
    assert np.array_equal(np.asarray(shown(mask, 0)), np.asarray(mask))


@pytest.mark.parametrize("box", [(30, 30, 31, 31), (0, 40, 96, 41), (20, 20, 60, 60)])
def test_all_of_the_mask_shows_however_thin(box):
    overlay = np.asarray(shown(square(box), 4))
    assert overlay[box[1] : box[3], box[0] : box[2]].min() == 255


# By AUTOMATIC1111/stable-diffusion-webui, modules/masking.py (0cb7262), get_crop_region and expand_crop_region:
# image, mask's box, padding, size asked for, region, region expanded.
REGIONS = [
    ((512, 512), (256, 0, 512, 256), 0, (512, 512), (256, 0, 512, 256), (256, 0, 512, 256)),
    ((512, 512), (100, 200, 228, 232), 0, (512, 512), (100, 200, 228, 232), (100, 152, 228, 280)),
    ((1000, 800), (300, 300, 401, 402), 32, (512, 512), (268, 268, 433, 434), (268, 268, 434, 434)),
    ((1000, 800), (900, 10, 1000, 30), 32, (512, 512), (868, 0, 1000, 62), (868, 0, 1000, 132)),
    ((640, 480), (0, 0, 640, 20), 32, (512, 768), (0, 0, 640, 52), (0, 0, 640, 480)),
    ((640, 480), (300, 470, 301, 471), 0, (768, 512), (300, 470, 301, 471), (300, 470, 301, 471)),
    ((300, 100), (0, 40, 300, 60), 8, (512, 512), (0, 32, 300, 68), (0, 0, 300, 100)),
    ((4000, 3000), (1500, 1200, 1900, 1900), 64, (768, 1024), (1436, 1136, 1964, 1964), (1390, 1136, 2011, 1964)),
    ((64, 64), (63, 63, 64, 64), 32, (64, 64), (31, 31, 64, 64), (31, 31, 64, 64)),
    ((100, 400), (20, 10, 60, 390), 5, (512, 256), (15, 5, 65, 395), (0, 5, 100, 395)),
]


@pytest.mark.parametrize(("size", "box", "padding", "asked", "region", "whole"), REGIONS)
def test_the_region_is_a1111s(size, box, padding, asked, region, whole):
    assert crop_region(square(box, size), padding) == region
    assert expanded(region, asked, size) == whole


def test_a_black_mask_has_no_region():
    assert crop_region(Image.new("L", (64, 64)), 32) is None


def test_a_fill_has_the_colors_around_the_mask():
    image = Image.new("RGB", (96, 96), (200, 40, 40))
    ImageDraw.Draw(image).rectangle((32, 32, 63, 63), fill="blue")
    result = np.asarray(filled(image, square((32, 32, 64, 64)))).astype(int)
    assert np.abs(result - np.array([200, 40, 40])).max() <= 6, "nothing blue is left, and what is kept stays"


def test_a_fill_of_everything_leaves_the_image():
    image = Image.new("RGB", (32, 32), (200, 40, 40))
    assert np.array_equal(np.asarray(filled(image, Image.new("L", (32, 32), 255))), np.asarray(image))
