"""The size of an encoded image by its header, for services without an image library. Decodes no pixel.

A reader is a generator that yields which bytes it needs, gets those of them that exist, and returns the size. Sizes are
upright, as EXIF turns the image; a turn that only XMP or what follows the pixels names is not seen.
"""

import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from services.kernel.blobs import ByteRange
from services.kernel.heif_headers import DamagedHeif, is_heif, read_heif_size

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSize:
    width_px: int
    height_px: int


Reader = Generator[ByteRange, bytes, T]

# Parts of a file that are looked at before a reader stops; those with the size and the EXIF come first.
PARTS_LIMIT = 512
# Of one directory of a TIFF.
ENTRIES_LIMIT = 4_096
# How far behind a segment of a JPEG the next one is looked for.
JUNK_LIMIT_BYTES = 4_096

_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274
# Values of the orientation that exchange width and height.
_QUARTER_TURNS = (5, 6, 7, 8)
# Of TIFF's types of one number: its size and format.
_NUMBERS = {1: "B", 3: "H", 4: "I"}
_EXIF = b"Exif\x00\x00"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))
_JPEG_LAST = (0xD9, 0xDA)


class _Damaged(Exception):
    pass


def read_size() -> Reader[ImageSize | None]:
    """The size of a PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC; None where the header cannot be read."""
    try:
        head = yield ByteRange(offset_bytes=0, size_bytes=16)
        width_px, height_px = yield from _read(head)
    except (_Damaged, DamagedHeif):
        return None
    return ImageSize(width_px=width_px, height_px=height_px) if width_px and height_px else None


def size_in(data: bytes) -> ImageSize | None:
    """As `read_size`, of a whole image."""
    reader = read_size()
    try:
        wanted = next(reader)
        while True:
            wanted = reader.send(data[wanted.offset_bytes : wanted.offset_bytes + wanted.size_bytes])
    except StopIteration as done:
        size: ImageSize | None = done.value
        return size


def _read(head: bytes) -> Reader[tuple[int, int]]:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return (yield from _png())
    if head.startswith(b"\xff\xd8\xff"):
        return (yield from _jpeg())
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return (yield from _webp())
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return (yield from _pair("<HH", 6))
    if head.startswith(b"BM"):
        return (yield from _bmp())
    if head[:4] in (b"II*\x00", b"MM\x00*"):
        return (yield from _tiff())
    if is_heif(head):
        return (yield from read_heif_size())
    raise _Damaged


def _bytes(offset: int, count: int) -> Reader[bytes]:
    data = yield ByteRange(offset_bytes=offset, size_bytes=count)
    if len(data) < count:
        raise _Damaged
    return data


def _numbers(layout: str, offset: int) -> Reader[tuple[int, ...]]:
    return struct.unpack(layout, (yield from _bytes(offset, struct.calcsize(layout))))


def _pair(layout: str, offset: int) -> Reader[tuple[int, int]]:
    first, second = yield from _numbers(layout, offset)
    return first, second


def _png() -> Reader[tuple[int, int]]:
    if (yield from _bytes(12, 4)) != b"IHDR":
        raise _Damaged
    width, height = yield from _numbers(">II", 16)
    return (yield from _turned(width, height, _png_orientation()))


def _png_orientation() -> Reader[int]:
    offset = 8
    for _ in range(PARTS_LIMIT):
        size, kind = struct.unpack(">I4s", (yield from _bytes(offset, 8)))
        if kind == b"eXIf":
            return (yield from _exif(offset + 8))
        if kind in (b"IDAT", b"IEND"):
            break
        offset += size + 12
    return 1


def _jpeg() -> Reader[tuple[int, int]]:
    size: tuple[int, int] | None = None
    orientation, offset = 1, 2
    for _ in range(PARTS_LIMIT):
        try:
            offset, marker = yield from _next_marker(offset)
            if marker in _JPEG_LAST:
                break
            if marker in _JPEG_WITHOUT_LENGTH:
                continue
            (length,) = yield from _numbers(">H", offset)
            if marker in _JPEG_SIZES:
                height, width = yield from _numbers(">HH", offset + 3)
                size = width, height
            elif marker == 0xE1 and (yield from _bytes(offset + 2, len(_EXIF))) == _EXIF:
                orientation = yield from _orientation(_exif(offset + 2))
        except _Damaged:
            break
        offset += length
    if size is None:
        raise _Damaged
    return size[::-1] if orientation in _QUARTER_TURNS else size


def _next_marker(offset: int) -> Reader[tuple[int, int]]:
    """The offset behind the next marker, and its second byte."""
    data = yield ByteRange(offset_bytes=offset, size_bytes=JUNK_LIMIT_BYTES)
    at = 0
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        if data[at + 1] not in (0x00, 0xFF):
            return offset + at + 2, data[at + 1]
        at += 1
    raise _Damaged


def _webp() -> Reader[tuple[int, int]]:
    kind = yield from _bytes(12, 4)
    if kind == b"VP8 ":
        start, width, height = struct.unpack("<3sHH", (yield from _bytes(23, 7)))
        if start != b"\x9d\x01\x2a":
            raise _Damaged
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        signature, bits = struct.unpack("<BI", (yield from _bytes(20, 5)))
        if signature != 0x2F:
            raise _Damaged
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        sides = yield from _bytes(24, 6)
        width, height = (int.from_bytes(each, "little") + 1 for each in (sides[:3], sides[3:]))
        return (yield from _turned(width, height, _webp_orientation()))
    raise _Damaged


def _webp_orientation() -> Reader[int]:
    offset = 12
    for _ in range(PARTS_LIMIT):
        kind, size = struct.unpack("<4sI", (yield from _bytes(offset, 8)))
        if kind == b"EXIF":
            return (yield from _exif(offset + 8))
        offset += 8 + size + size % 2
    return 1


def _bmp() -> Reader[tuple[int, int]]:
    (header_bytes,) = yield from _numbers("<I", 14)
    if header_bytes == 12:
        return (yield from _pair("<HH", 18))
    width, height = yield from _pair("<ii", 18)
    return abs(width), abs(height)


def _tiff() -> Reader[tuple[int, int]]:
    tags = yield from _directory(0)
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise _Damaged
    size = tags[_WIDTH], tags[_HEIGHT]
    return size[::-1] if tags.get(_ORIENTATION) in _QUARTER_TURNS else size


def _turned(width: int, height: int, orientation: Reader[int]) -> Reader[tuple[int, int]]:
    turn = yield from _orientation(orientation)
    return (height, width) if turn in _QUARTER_TURNS else (width, height)


def _orientation(reader: Reader[int]) -> Reader[int]:
    """1, which is upright, where it cannot be read: broken EXIF says nothing about the pixels."""
    try:
        return (yield from reader)
    except _Damaged:
        return 1


def _exif(offset: int) -> Reader[int]:
    starts = (yield from _bytes(offset, len(_EXIF))) == _EXIF
    tags = yield from _directory(offset + len(_EXIF) if starts else offset)
    return tags.get(_ORIENTATION, 1)


def _directory(base: int) -> Reader[dict[int, int]]:
    """The numbers of a TIFF's first directory, by tag. `base`: where the TIFF begins."""
    order = {b"II": "<", b"MM": ">"}.get((yield from _bytes(base, 2)))
    if order is None:
        raise _Damaged
    (first,) = yield from _numbers(f"{order}I", base + 4)
    (count,) = yield from _numbers(f"{order}H", base + first)
    data = yield ByteRange(offset_bytes=base + first + 2, size_bytes=12 * min(count, ENTRIES_LIMIT))
    found = {}
    for at in range(0, len(data) - 11, 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", data, at)
        if kind in _NUMBERS and values >= 1:
            (found[tag],) = struct.unpack_from(f"{order}{_NUMBERS[kind]}", data, at + 8)
    return found
