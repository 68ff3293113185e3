"""Finished pixels to PNG, ten times as fast as Pillow: one filter for all rows, and ISA-L's deflate. Needs no torch."""

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

MEDIA_TYPE = "image/png"
# As small as zlib's default level makes it within some percent, in a tenth of the time.
_LEVEL = 1
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT = (8, 2, 0, 0, 0)
# The filter type `Up`: each pixel less the one above it.
_UP = 2

Pixels = npt.NDArray[np.uint8]


def encode_png(pixels: Pixels, texts: Mapping[str, str] | None = None) -> bytes:
    """`pixels`: RGB, (H, W, 3). `texts`: by keyword, such as `parameters`."""
    height, width, _ = pixels.shape
    chunks = [_chunk(b"IHDR", struct.pack(">II5B", width, height, *_RGB_8_BIT))]
    chunks += [_text(keyword, text) for keyword, text in (texts or {}).items()]
    chunks += [_chunk(b"IDAT", isal_zlib.compress(_filtered(pixels), _LEVEL)), _chunk(b"IEND", b"")]
    return _SIGNATURE + b"".join(chunks)


def _filtered(pixels: Pixels) -> Pixels:
    height, width, _ = pixels.shape
    flat = pixels.reshape(height, width * 3)
    rows = np.empty((height, 1 + width * 3), dtype=np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    return rows


def _text(keyword: str, text: str) -> bytes:
    """The plain chunk that everybody reads where it can hold the text, else the one for UTF-8."""
    key = keyword.encode("latin-1")
    try:
        return _chunk(b"tEXt", key + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", key + b"\0\0\0\0\0" + text.encode())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
