"""Finished pixels to the bytes that were asked for, with what they were painted from inside. Needs no torch."""

import io
from collections.abc import Mapping

from PIL import Image

from services.diffusion.generation import Format
from services.diffusion.pictures.png import Pixels, encode_png

MEDIA_TYPES = {Format.PNG: "image/png", Format.WEBP: "image/webp", Format.JPEG: "image/jpeg"}

# A1111's text, and what Fanlight knows; PNG keywords.
PARAMETERS, PROVENANCE = "parameters", "fanlight"

LOSSLESS_QUALITY = 100
# libwebp's quickest; its slower ones cost a multiple for a few percent.
_WEBP_METHOD = 1
_USER_COMMENT, _IMAGE_DESCRIPTION, _EXIF_IFD = 0x9286, 0x010E, 0x8769
# A JPEG's EXIF block holds 64 KiB.
_EXIF_LIMIT_BYTES = 60_000


def encode(pixels: Pixels, texts: Mapping[str, str], *, format: Format, quality: int) -> bytes:  # noqa: A002
    """`texts`: under PARAMETERS and PROVENANCE. `quality`: 1 to 100, of WebP and JPEG."""
    if format is Format.PNG:
        return encode_png(pixels, texts)
    image, out = Image.fromarray(pixels), io.BytesIO()
    exif = _exif(texts)
    if format is Format.JPEG:
        image.save(out, "JPEG", quality=quality, exif=exif)
    else:
        lossless = quality == LOSSLESS_QUALITY
        image.save(out, "WEBP", quality=0 if lossless else quality, lossless=lossless, method=_WEBP_METHOD, exif=exif)
    return out.getvalue()


def _exif(texts: Mapping[str, str]) -> Image.Exif:
    """The user's comment is where A1111 and its readers look. What does not fit is left out."""
    exif = Image.Exif()
    comment = b"UNICODE\0" + texts.get(PARAMETERS, "").encode("utf-16-be")
    if len(comment) <= _EXIF_LIMIT_BYTES:
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
    description = texts.get(PROVENANCE, "")
    if len(comment) + len(description) <= _EXIF_LIMIT_BYTES:
        exif[_IMAGE_DESCRIPTION] = description
    return exif
