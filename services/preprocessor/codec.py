"""Encoded images to arrays of pixels, and control maps to PNGs. Knows no annotator.

Plain JPEGs and PNGs are decoded by faster libraries that give exactly Pillow's pixels; Pillow decodes, or refuses,
everything else.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from cv2.typing import MatLike
from isal import isal_zlib

from services.kernel.images import ImageLimits, decode_rgb, decode_rgba, read_header
from services.kernel.process import without
from services.preprocessor.annotator import Pixels

# It would load CUDA's compiler where that is installed.
with without("nvidia"):
    import kornia_rs

# How a JPEG starts; the segments that do not change colors or orientation: JFIF's, tables, restarts and a comment; the
# kinds of frame headers, which hold the size; the segment right before the pixels.
JPEG_START = b"\xff\xd8"
JPEG_NEUTRAL = frozenset((0xE0, 0xDB, 0xC4, 0xDD, 0xFE))
JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
JPEG_SCAN = 0xDA
# How a whole JPEG ends. OpenCV fills the missing part of a truncated one with gray and reports no error.
JPEG_END = b"\xff\xd9"
# A segment as if it were a frame header: marker, kind, length, bits per channel, height, width, channels.
_FRAME = struct.Struct(">BBHBHHB")

# How a PNG starts, with the length and kind of its first chunk. That chunk holds width, height, bits per channel, color
# type, compression, filter and interlacing; the last five are PNG_PLAIN in an RGB image that is not interlaced.
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
_HEADER = struct.Struct(">II5s")
PNG_PLAIN = bytes((8, 2, 0, 0, 0))
# A chunk is its length, its kind, its data and a checksum. These kinds hold pixels, or what Pillow ignores in RGB.
_CHUNK = struct.Struct(">I4s")
CHECKSUM_BYTES = 4
PNG_NEUTRAL = frozenset((b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs", b"hIST", b"tIME"))
# The names of the texts that may hold an orientation.
PNG_TEXT, PNG_ORIENTATIONS = b"tEXt", (b"Raw profile", b"XML:")
PNG_CHUNKS_MAX = 16_384

PNG_MEDIA_TYPE = "image/png"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of ISA-L's deflate: it takes a quarter of the time of zlib's fastest level, for files of about the same size.
DEFLATE_LEVEL = 1
# PNG's row filters: a byte itself, or less the one above, or less the mean of that and the one to the left.
FILTER_NONE, FILTER_UP, FILTER_AVERAGE = 0, 2, 3
# How many bytes are filtered at a time, so that they stay in the processor's cache.
BLOCK_BYTES = 65_536
# PNG's color types by the number of channels.
COLOR_TYPES = {1: 0, 3: 2, 4: 6}

Octets: TypeAlias = npt.NDArray[np.uint8]
Decoder: TypeAlias = Callable[[bytes, ImageLimits], Pixels | None]


def decode(data: bytes, *, keeps_alpha: bool, limits: ImageLimits) -> Pixels:
    """RGB (H, W, 3), or RGBA (H, W, 4) with its transparency; uint8. InvalidField and TooLarge about `image`."""
    if keeps_alpha:
        return np.asarray(decode_rgba(data, field="image", limits=limits))
    fast: Decoder = _decode_png if data.startswith(PNG_START) else _decode_jpeg
    pixels = fast(data, limits)
    return np.asarray(decode_rgb(data, field="image", limits=limits)) if pixels is None else pixels


def _decode_jpeg(data: bytes, limits: ImageLimits) -> Pixels | None:
    """(H, W, 3) uint8; None if it is not a plain JPEG. Pillow takes twice as long."""
    if not data.endswith(JPEG_END) or not (_is_plain_jpeg(data, limits) or _is_upright(data, limits)):
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _is_plain_jpeg(data: bytes, limits: ImageLimits) -> bool:
    """A JPEG in RGB within the limits, with no orientation before its pixels. Pillow takes five times as long."""
    if not data.startswith(JPEG_START) or len(data) > limits.size_bytes:
        return False
    at, has_frame = len(JPEG_START), False
    while at + _FRAME.size <= len(data):
        mark, kind, length, bits, height, width, channels = _FRAME.unpack_from(data, at)
        if mark == 0xFF and kind == JPEG_SCAN:
            return has_frame
        if mark == 0xFF and kind in JPEG_FRAMES and not has_frame:
            has_frame = (bits, channels) == (8, 3) and _fits(width, height, limits)
        elif mark != 0xFF or kind not in JPEG_NEUTRAL:
            return False
        # A segment's length counts its own two bytes, not the marker's.
        at += 2 + length
    return False


def _is_upright(data: bytes, limits: ImageLimits) -> bool:
    header = read_header(data, field="image", limits=limits)
    return (header.kind, header.mode) == ("JPEG", "RGB") and header.is_upright


def _decode_png(data: bytes, limits: ImageLimits) -> Pixels | None:
    """(H, W, 3) uint8; None if it is not a plain PNG. Pillow takes three times as long."""
    if len(data) > limits.size_bytes or len(data) < len(PNG_START) + _HEADER.size:
        return None
    width, height, kind = _HEADER.unpack_from(data, len(PNG_START))
    if kind != PNG_PLAIN or not _fits(width, height, limits) or not _is_plain_png(data):
        return None
    try:
        pixels: Pixels = kornia_rs.io.decode_image_png_u8(data, (height, width), "rgb")
    except Exception:  # it raises nothing narrower about a damaged image
        return None
    return pixels


def _is_plain_png(data: bytes) -> bool:
    """Whole, with no chunk that could turn it or make it transparent."""
    at = len(PNG_START) + _HEADER.size + CHECKSUM_BYTES
    for _ in range(PNG_CHUNKS_MAX):
        if at + _CHUNK.size > len(data):
            return False
        length, kind = _CHUNK.unpack_from(data, at)
        at += _CHUNK.size
        if kind == b"IEND":
            return True
        if kind not in PNG_NEUTRAL and (kind != PNG_TEXT or data.startswith(PNG_ORIENTATIONS, at)):
            return False
        at += length + CHECKSUM_BYTES
    return False


def _fits(width: int, height: int, limits: ImageLimits) -> bool:
    return max(width, height) <= limits.side_px and 0 < width * height <= limits.pixels


def encode_png(control: MatLike, *, is_bilevel: bool = False, texts: Mapping[str, str] | None = None) -> bytes:
    """A map as a PNG, fast first and small second: (H, W) gray, (H, W, 3) RGB or (H, W, 4) RGBA, uint8.

    `is_bilevel`: it is (H, W) and has 0 and 255 only, so that one bit per pixel is enough. `texts` are stored in the
    PNG under their ASCII names.
    """
    pixels: Octets = np.asarray(control, np.uint8)
    height, width, channels = (*pixels.shape, 1)[:3]
    head = struct.pack(">IIBBBBB", width, height, 1 if is_bilevel else 8, COLOR_TYPES[channels], 0, 0, 0)
    rows = _bit_rows(pixels) if is_bilevel else _filtered_rows(pixels.reshape(height, -1), channels)
    text_chunks = (_chunk(b"tEXt", name.encode() + b"\0" + text.encode()) for name, text in (texts or {}).items())
    body = _chunk(b"IDAT", isal_zlib.compress(rows.data, DEFLATE_LEVEL))
    return b"".join((PNG_SIGNATURE, _chunk(b"IHDR", head), *text_chunks, body, _chunk(b"IEND", b"")))


def _bit_rows(control: Octets) -> Octets:
    """(H, 1 + ceil(W / 8)), a filter byte and eight pixels per byte, of (H, W): an eighth of the bytes to compress."""
    bits = np.packbits(control, axis=1)
    rows = np.empty((len(bits), 1 + bits.shape[1]), np.uint8)
    rows[:, 0], rows[:, 1:] = FILTER_NONE, bits
    return rows


def _filtered_rows(flat: Octets, channels: int) -> Octets:
    """(H, 1 + W * C), a filter byte and filtered samples, of samples (H, W * C).

    A map with one channel changes slowly from row to row; an image has more detail, for which the mean pays off.
    """
    rows = np.empty((len(flat), 1 + flat.shape[1]), np.uint8)
    rows[:, 0] = FILTER_UP if channels == 1 else FILTER_AVERAGE
    above, step = np.zeros_like(flat[:1]), max(1, BLOCK_BYTES // flat.shape[1])
    for top in range(0, len(flat), step):
        part = flat[top : top + step]
        guess, above = np.concatenate((above, part[:-1])), part[-1:]
        if channels > 1:
            left = np.zeros_like(part)
            left[:, channels:] = part[:, :-channels]
            guess = _mean(guess, left)
        np.subtract(part, guess, out=rows[top : top + step, 1:])
    return rows


def _mean(one: Octets, other: Octets) -> Octets:
    """Rounded down, of two arrays (h, W * C) uint8 without overflow."""
    return (one & other) + ((one ^ other) >> np.uint8(1))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
