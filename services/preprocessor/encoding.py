"""A map as a PNG: quick first, small second. Knows no annotator."""

import struct
import zlib
from collections.abc import Mapping

import cv2
import numpy as np
from cv2.typing import MatLike

# A grey map is mostly flat, so filters only cost; a picture needs one.
PNG_QUICK = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE)
PNG_MAP = (*PNG_QUICK, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE)
PNG_COLOUR = (*PNG_QUICK, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG)

MEDIA_TYPE = "image/png"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Signature, and the chunk IHDR with its length, name and checksum.
HEAD_BYTES = len(SIGNATURE) + 25
BILEVEL_LEVEL, BILEVEL_WINDOW_BITS, BILEVEL_MEMORY = 1, 15, 8


def png(control: MatLike, *, is_bilevel: bool = False, texts: Mapping[str, str] | None = None) -> bytes:
    """(H, W) grey, one bit a pixel where `is_bilevel` says that it has 0 and 255 only, (H, W, 3) RGB or (H, W, 4) RGBA.

    `texts` are kept inside by their ASCII names.
    """
    data = _bilevel(control) if is_bilevel else _several_bits(control)
    chunks = b"".join(_chunk(b"tEXt", name.encode() + b"\0" + text.encode()) for name, text in (texts or {}).items())
    return data[:HEAD_BYTES] + chunks + data[HEAD_BYTES:] if chunks else data


def _several_bits(control: MatLike) -> bytes:
    if control.ndim == 2:
        written, data = cv2.imencode(".png", control, PNG_MAP)
    else:
        order = cv2.COLOR_RGBA2BGRA if control.shape[2] == 4 else cv2.COLOR_RGB2BGR
        written, data = cv2.imencode(".png", cv2.cvtColor(control, order), PNG_COLOUR)
    assert written
    return data.tobytes()


def _bilevel(control: MatLike) -> bytes:
    """Eight pixels a byte: an eighth of the bytes for zlib to look at, which is what encoding a map costs."""
    height, width = control.shape
    bits = np.packbits(control != 0, axis=1)
    rows = np.zeros((height, bits.shape[1] + 1), np.uint8)
    rows[:, 1:] = bits
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(BILEVEL_LEVEL, zlib.DEFLATED, BILEVEL_WINDOW_BITS, BILEVEL_MEMORY, zlib.Z_RLE)
    body = packer.compress(rows.data) + packer.flush()
    return SIGNATURE + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
