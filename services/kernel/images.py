"""Decodes an encoded image to upright RGB or RGBA, within limits that are checked before anything is decoded.

Needs Pillow, which the extras of the stages install; the gateway never imports this module.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from fanlight.errors import InvalidField, TooLarge
from services.kernel.heif_decoder import decode_heif
from services.kernel.heif_headers import is_heif
from services.kernel.image_headers import size_in

# Those that Pillow decodes in this process, and those that a process of their own decodes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
HEIF_FORMATS = ("AVIF", "HEIC")

# What Pillow raises for damaged bytes; every one of them was observed.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, struct.error, zlib.error)

# By the value of the EXIF tag Orientation.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    size_bytes: int = 32 * 1024 * 1024
    pixels: int = 40_000_000
    # OpenCV stores pixel coordinates in 16 bits where it remaps images: at most 32,766.
    side_px: int = 16_384


def decode_rgb(data: bytes, *, field: str, limits: ImageLimits) -> Image.Image:
    """A Pillow image, RGB with 8 bits each, turned as its EXIF says, transparency on white. InvalidField, TooLarge."""
    return _decoded(data, _on_white, field, limits)


def decode_rgba(data: bytes, *, field: str, limits: ImageLimits) -> Image.Image:
    """As `decode_rgb`, but RGBA, with the transparency kept; opaque if the image has none."""
    return _decoded(data, lambda image: _in_8_bits(image).convert("RGBA"), field, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What an encoded image says about itself before it is decoded. `is_upright`: its EXIF does not turn it."""

    kind: str
    mode: str
    is_upright: bool


def read_header(data: bytes, *, field: str, limits: ImageLimits) -> ImageHeader:
    """The header of an encoded image within the limits. InvalidField, TooLarge."""
    if is_heif(data):
        return ImageHeader(kind="HEIF", mode="", is_upright=False)
    with _opened(data, field, limits) as image:
        turn = _TURNS.get(_orientation(image))
        return ImageHeader(kind=image.format or "", mode=image.mode, is_upright=turn is None)


def _decoded(data: bytes, finish: Callable[[Image.Image], Image.Image], field: str, limits: ImageLimits) -> Image.Image:
    if is_heif(data):
        return finish(_decoded_heif(data, field, limits))
    with _opened(data, field, limits) as image:
        image.load()
        return finish(_upright(image))


def _decoded_heif(data: bytes, field: str, limits: ImageLimits) -> Image.Image:
    _check_bytes(data, field, limits)
    size = size_in(data)
    if size is None:
        raise InvalidField("is a damaged or truncated image", field=field)
    _check_size((size.width_px, size.height_px), field, limits)
    return decode_heif(data, size, field=field)


def _check_bytes(data: bytes, field: str, limits: ImageLimits) -> None:
    if not data:
        raise InvalidField("is empty; send an encoded image", field=field)
    if len(data) > limits.size_bytes:
        raise TooLarge(f"has {len(data)} bytes; at most {limits.size_bytes} are accepted", field=field)


@contextmanager
def _opened(data: bytes, field: str, limits: ImageLimits) -> Iterator[ImageFile.ImageFile]:
    """An image whose header is valid, not decoded yet. Errors of Pillow inside become errors of the image."""
    _check_bytes(data, field, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size, field, limits)
        _check_mode(image, field)
        yield image
    except Image.DecompressionBombError as error:
        raise TooLarge(f"has far more than the {limits.pixels} pixels that are accepted", field=field) from error
    except UnidentifiedImageError as error:
        known = ", ".join((*FORMATS, *HEIF_FORMATS))
        raise InvalidField(f"is not an image of a known format ({known})", field=field) from error
    except _DAMAGE as error:
        raise InvalidField("is a damaged or truncated image", field=field) from error


def _check_size(size_px: tuple[int, int], field: str, limits: ImageLimits) -> None:
    width, height = size_px
    if max(width, height) > limits.side_px or width * height > limits.pixels:
        raise TooLarge(
            f"is {width} x {height} pixels; at most {limits.pixels} pixels and {limits.side_px} a side are accepted",
            field=field,
        )


def _check_mode(image: Image.Image, field: str) -> None:
    if image.mode == "F":
        raise InvalidField("has floating-point pixels, whose range is unknown; send 8 or 16 bits", field=field)


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> object:
    """The value of the EXIF tag; None if there is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return None  # a broken EXIF block says nothing about the pixels


def _in_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16 bit to 8 instead of scaling.
        return image.convert("I").point(lambda value: value / 257).convert("L")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    image = _in_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
