"""From encoded bytes to an upright RGB picture, within limits that are checked before anything is decoded.

Needs Pillow, which the extras of the stages bring; the gateway never imports this module.
"""

import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from services.kernel.errors import InvalidField, TooLarge

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureLimits:
    size_bytes: int = 32 * 1024 * 1024
    pixels: int = 40_000_000
    side_px: int = 16_384


def decode_rgb(data: bytes, *, field: str, limits: PictureLimits) -> Image.Image:
    """An RGB picture, turned as its EXIF says, transparency on white. InvalidField, TooLarge."""
    if not data:
        raise InvalidField("is empty; send an encoded picture", field=field)
    if len(data) > limits.size_bytes:
        raise TooLarge(f"has {len(data)} bytes; at most {limits.size_bytes} are taken", field=field)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(picture, field, limits)
            picture.load()
            return _on_white(_upright(picture))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InvalidField(f"is not a picture of a known format ({', '.join(FORMATS)})", field=field) from error
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError) as error:
        raise InvalidField("is a damaged or truncated picture", field=field) from error


def _check_size(picture: ImageFile.ImageFile, field: str, limits: PictureLimits) -> None:
    width, height = picture.size
    if max(width, height) > limits.side_px or width * height > limits.pixels:
        raise TooLarge(
            f"is {width} x {height} pixels; at most {limits.pixels} pixels and {limits.side_px} a side are taken",
            field=field,
        )


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError):
        return picture  # a broken EXIF block says nothing about the pixels


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow clips 16 bit to 8 instead of scaling.
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")
