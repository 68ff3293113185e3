"""From encoded bytes to an upright RGB picture, within limits that are checked before anything is decoded.

Needs Pillow, which the extras of the stages bring; the gateway never imports this module.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from fanlight.errors import InvalidField, TooLarge

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# What Pillow raises about damaged bytes; all of it was seen.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, struct.error, zlib.error)

# By the value of the EXIF tag.
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
class PictureLimits:
    size_bytes: int = 32 * 1024 * 1024
    pixels: int = 40_000_000
    side_px: int = 16_384


def decode_rgb(data: bytes, *, field: str, limits: PictureLimits) -> Image.Image:
    """An RGB picture, turned as its EXIF says, transparency on white. InvalidField, TooLarge."""
    return _decoded(data, _on_white, field, limits)


def decode_rgba(data: bytes, *, field: str, limits: PictureLimits) -> Image.Image:
    """As `decode_rgb`, with the transparency kept; opaque where the picture has none."""
    return _decoded(data, lambda picture: _in_8_bits(picture).convert("RGBA"), field, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a picture says of itself before it is decoded. `is_upright` unless its EXIF turns it."""

    kind: str
    mode: str
    is_upright: bool


def read_header(data: bytes, *, field: str, limits: PictureLimits) -> Header:
    """The header of a picture within the limits. InvalidField, TooLarge."""
    with _opened(data, field, limits) as picture:
        turn = _TURNS.get(_orientation(picture))
        return Header(kind=picture.format or "", mode=picture.mode, is_upright=turn is None)


def _decoded(
    data: bytes, finish: Callable[[Image.Image], Image.Image], field: str, limits: PictureLimits
) -> Image.Image:
    with _opened(data, field, limits) as picture:
        picture.load()
        return finish(_upright(picture))


@contextmanager
def _opened(data: bytes, field: str, limits: PictureLimits) -> Iterator[ImageFile.ImageFile]:
    """A picture whose header is right, not decoded yet; what goes wrong with it inside is the picture's fault."""
    if not data:
        raise InvalidField("is empty; send an encoded picture", field=field)
    if len(data) > limits.size_bytes:
        raise TooLarge(f"has {len(data)} bytes; at most {limits.size_bytes} are taken", field=field)
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(picture, field, limits)
        _check_mode(picture, field)
        yield picture
    except Image.DecompressionBombError as error:
        raise TooLarge(f"has far more than the {limits.pixels} pixels that are taken", field=field) from error
    except UnidentifiedImageError as error:
        raise InvalidField(f"is not a picture of a known format ({', '.join(FORMATS)})", field=field) from error
    except _DAMAGE as error:
        raise InvalidField("is a damaged or truncated picture", field=field) from error


def _check_size(picture: ImageFile.ImageFile, field: str, limits: PictureLimits) -> None:
    width, height = picture.size
    if max(width, height) > limits.side_px or width * height > limits.pixels:
        raise TooLarge(
            f"is {width} x {height} pixels; at most {limits.pixels} pixels and {limits.side_px} a side are taken",
            field=field,
        )


def _check_mode(picture: Image.Image, field: str) -> None:
    if picture.mode == "F":
        raise InvalidField("has floating-point pixels, whose range nobody knows; send 8 or 16 bits", field=field)


def _upright(picture: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: Image.Image) -> object:
    """The value of the EXIF tag; None where there is none."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return None  # a broken EXIF block says nothing about the pixels


def _in_8_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow clips 16 bit to 8 instead of scaling.
        return picture.convert("I").point(lambda value: value / 257).convert("L")
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    picture = _in_8_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
