"""Reads the small PNGs that images are compared by, and says how far two of them are apart. Pure."""

import struct
import zlib
from collections.abc import Iterator

SIDE_PX = 16
CHANNELS = 3
SIZE_BYTES = SIDE_PX * SIDE_PX * CHANNELS
# A PNG of so few pixels has far fewer bytes.
PNG_LIMIT_BYTES = 64 * 1024
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# 8 bits per channel, RGB, not interlaced.
_HEADER = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 2, 0, 0, 0)


def pixels_of(png: bytes) -> bytes | None:
    """RGB pixels (SIDE_PX, SIDE_PX, 3), 0 to 255, row by row; None for anything but such a PNG."""
    if len(png) > PNG_LIMIT_BYTES or not png.startswith(_SIGNATURE):
        return None
    chunks = list(_chunks(png))
    if not chunks or chunks[0] != (b"IHDR", _HEADER):
        return None
    packed = b"".join(data for kind, data in chunks if kind == b"IDAT")
    try:
        rows = zlib.decompressobj().decompress(packed, SIZE_BYTES + SIDE_PX + 1)
    except zlib.error:
        return None
    return _unfiltered(rows) if len(rows) == SIZE_BYTES + SIDE_PX else None


def distance(one: bytes, other: bytes) -> float:
    """The mean absolute difference of two thumbnails' pixels, 0 to 255."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data; the checksums are not looked at: who made it could make them too."""
    at = len(_SIGNATURE)
    while at + 8 <= len(png):
        size_bytes, kind = struct.unpack_from(">I4s", png, at)
        yield kind, png[at + 8 : at + 8 + size_bytes]
        at += size_bytes + 12


def _unfiltered(rows: bytes) -> bytes | None:
    """Undo PNG's row filters (PNG specification, section 9); None for an unknown one."""
    row_bytes = SIDE_PX * CHANNELS
    above, out = bytes(row_bytes), bytearray()
    for start in range(0, len(rows), row_bytes + 1):
        kind, row = rows[start], bytearray(rows[start + 1 : start + 1 + row_bytes])
        if kind > 4:
            return None
        for i in range(row_bytes):
            left = row[i - CHANNELS] if i >= CHANNELS else 0
            corner = above[i - CHANNELS] if i >= CHANNELS else 0
            row[i] = (row[i] + _predicted(kind, left, above[i], corner)) & 0xFF
        above = bytes(row)
        out += row
    return bytes(out)


def _predicted(kind: int, left: int, above: int, corner: int) -> int:
    if kind == 4:
        guess = left + above - corner
        return min((left, above, corner), key=lambda each: abs(guess - each))
    return (0, left, above, (left + above) // 2)[kind]
