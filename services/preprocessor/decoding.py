"""Pictures as arrays of pixels. Plain JPEGs and PNGs go by quicker libraries, which give Pillow's very pixels.

Knows no annotator. Of whatever is not plain, or is damaged, Pillow is the judge.
"""

import struct
from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np

from services.kernel.pictures import PictureLimits, decode_rgb, decode_rgba, read_header
from services.kernel.without import without
from services.preprocessor.annotator import Pixels

# It would load CUDA's compiler where that is installed.
with without("nvidia"):
    import kornia_rs

# How a JPEG starts; the segments that say nothing of colours or of a turn: JFIF's, tables, restarts and a comment; the
# kinds of frames, which tell the size; what comes right before the pixels.
JPEG_START = b"\xff\xd8"
JPEG_INDIFFERENT = frozenset((0xE0, 0xDB, 0xC4, 0xDD, 0xFE))
JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
JPEG_SCAN = 0xDA
# How a whole JPEG ends. OpenCV fills what is missing of another with grey instead of saying so.
JPEG_END = b"\xff\xd9"
# A segment as if it were a frame: marker, kind, length, bits of a channel, height, width, channels.
_FRAME = struct.Struct(">BBHBHHB")

# How a PNG starts, with the length and kind of its first chunk; then width, height, bits of a channel, kind of colour,
# compression, filter and interlacing, which are these in an RGB picture whose rows follow each other.
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_HEADER = struct.Struct(">II5s")
PNG_PLAIN = bytes((8, 2, 0, 0, 0))
# A chunk is its length, its kind, its data and a checksum. These kinds say nothing that Pillow heeds in an RGB picture.
_CHUNK = struct.Struct(">I4s")
CHECKSUM_BYTES = 4
PNG_INDIFFERENT = frozenset((b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs", b"hIST", b"tIME"))
# The names of the texts that may hold a turn.
PNG_TEXT, PNG_TURNS = b"tEXt", (b"Raw profile", b"XML:")
PNG_CHUNKS_MAX = 16_384

Decoder: TypeAlias = Callable[[bytes, PictureLimits], Pixels | None]


def decode(data: bytes, *, keeps_alpha: bool, limits: PictureLimits) -> Pixels:
    """(H, W, 3), or (H, W, 4) with its transparency. InvalidField and TooLarge about `picture`."""
    if keeps_alpha:
        return np.asarray(decode_rgba(data, field="image", limits=limits))
    quick: Decoder = _png if data.startswith(PNG_START) else _jpeg
    pixels = quick(data, limits)
    return np.asarray(decode_rgb(data, field="image", limits=limits)) if pixels is None else pixels


def _jpeg(data: bytes, limits: PictureLimits) -> Pixels | None:
    """Pillow takes twice as long."""
    if not data.endswith(JPEG_END) or not (_is_plain_jpeg(data, limits) or _is_upright(data, limits)):
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _is_plain_jpeg(data: bytes, limits: PictureLimits) -> bool:
    """A JPEG in RGB within the limits that nothing before its pixels could turn. Pillow takes five times as long."""
    if not data.startswith(JPEG_START) or len(data) > limits.size_bytes:
        return False
    at, has_frame = len(JPEG_START), False
    while at + _FRAME.size <= len(data):
        mark, kind, length, bits, height, width, channels = _FRAME.unpack_from(data, at)
        if mark == 0xFF and kind == JPEG_SCAN:
            return has_frame
        if mark == 0xFF and kind in JPEG_FRAMES and not has_frame:
            has_frame = (bits, channels) == (8, 3) and _fits(width, height, limits)
        elif mark != 0xFF or kind not in JPEG_INDIFFERENT:
            return False
        # A segment's length counts its own two bytes, not the marker's.
        at += 2 + length
    return False


def _is_upright(data: bytes, limits: PictureLimits) -> bool:
    header = read_header(data, field="image", limits=limits)
    return (header.kind, header.mode) == ("JPEG", "RGB") and header.is_upright


def _png(data: bytes, limits: PictureLimits) -> Pixels | None:
    """Pillow takes three times as long."""
    if len(data) > limits.size_bytes or len(data) < len(PNG_START) + _HEADER.size:
        return None
    width, height, kind = _HEADER.unpack_from(data, len(PNG_START))
    if kind != PNG_PLAIN or not _fits(width, height, limits) or not _is_plain_png(data):
        return None
    try:
        pixels: Pixels = kornia_rs.io.decode_image_png_u8(data, (height, width), "rgb")
    except Exception:  # it raises nothing narrower about a damaged picture
        return None
    return pixels


def _is_plain_png(data: bytes) -> bool:
    """Whole, with nothing in it that could turn it or let it be seen through."""
    at = len(PNG_START) + _HEADER.size + CHECKSUM_BYTES
    for _ in range(PNG_CHUNKS_MAX):
        if at + _CHUNK.size > len(data):
            return False
        length, kind = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        if kind == b"IEND":
            return True
        if kind not in PNG_INDIFFERENT and (kind != PNG_TEXT or data.startswith(PNG_TURNS, at)):
            return False
        at += length + CHECKSUM_BYTES
    return False


def _fits(width: int, height: int, limits: PictureLimits) -> bool:
    return max(width, height) <= limits.side_px and 0 < width * height <= limits.pixels
