"""The size of an AVIF or HEIC by the boxes of its header (ISO/IEC 14496-12 and 23008-12). Decodes no pixel.

A reader yields which bytes it needs and gets those of them that exist, as in `image_headers`. Sizes are upright: `irot`
turns the image, and in these formats the EXIF's orientation does not.
"""

import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

from services.kernel.blobs import AVIF, HEIC, HEIF, HEIF_BRANDS, ByteRange

T = TypeVar("T")
Reader = Generator[ByteRange, bytes, T]

# Boxes that are looked at inside one box.
BOXES_LIMIT = 1_024
# Of the box `ipma`, which names the properties of each item: a thousand items have some 10 KB.
ASSOCIATIONS_LIMIT_BYTES = 64 * 1024
# Of the box `ftyp`.
BRANDS_LIMIT_BYTES = 1_024

# A rectangle: width, height, and the distance of its middle from the image's, each a fraction.
_APERTURE = struct.Struct(">IIIIiIiI")


class DamagedHeif(Exception):
    """The boxes cannot be read, or lack the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    kind: bytes
    # Of its content, behind its header.
    start: int
    end: int


def is_heif(head: bytes) -> bool:
    """Whether the first 12 bytes are those of an AVIF or HEIC."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def is_avif(head: bytes) -> bool:
    """Whether a decoder of AVIF reads it, not one of HEIC, by its brands; `head` starts with the box `ftyp`."""
    end = min(int.from_bytes(head[:4], "big"), BRANDS_LIMIT_BYTES, len(head))
    own = HEIF_BRANDS.get(head[8:12])
    if own != HEIF:
        return own == AVIF
    kinds = {HEIF_BRANDS.get(head[at : at + 4]) for at in range(16, end - 3, 4)}
    return AVIF in kinds and HEIC not in kinds


def read_heif_size() -> Reader[tuple[int, int]]:
    """Width and height of the upright primary image. DamagedHeif."""
    head = yield ByteRange(offset_bytes=0, size_bytes=BRANDS_LIMIT_BYTES)
    meta = yield from _find(b"meta", 0, None)
    boxes = yield from _boxes(meta.start + 4, meta.end)
    primary = yield from _primary(_first(boxes, b"pitm"))
    properties = yield from _boxes(*_span(_first(boxes, b"iprp")))
    listed = yield from _boxes(*_span(_first(properties, b"ipco")))
    numbers = yield from _associated(_first(properties, b"ipma"), primary)
    chosen = [listed[number - 1] for number in numbers if 0 < number <= len(listed)]
    return (yield from _transformed(chosen, crops=not is_avif(head)))


def _transformed(properties: list[_Box], *, crops: bool) -> Reader[tuple[int, int]]:
    """`crops`: whether decoders of this kind apply `clap`; those of AVIF show the whole image."""
    width, height = yield from _numbers(">II", _first(properties, b"ispe").start + 4)
    for each in properties:
        if each.kind == b"irot":
            (turns,) = yield from _numbers(">B", each.start)
            if turns % 2:
                width, height = height, width
        elif each.kind == b"clap" and crops:
            values = _APERTURE.unpack((yield from _bytes(each.start, _APERTURE.size)))
            width, height = _rounded(values[0], values[1]), _rounded(values[2], values[3])
    return width, height


def _rounded(numerator: int, denominator: int) -> int:
    if denominator == 0:
        raise DamagedHeif
    return (2 * numerator + denominator) // (2 * denominator)


def _primary(box: _Box) -> Reader[int]:
    (version,) = yield from _numbers(">B", box.start)
    (item,) = yield from _numbers(">H" if version == 0 else ">I", box.start + 4)
    return item


def _associated(box: _Box, item: int) -> Reader[list[int]]:
    """The numbers, from 1, of an item's properties in their order."""
    size_bytes = box.end - box.start
    if not 8 <= size_bytes <= ASSOCIATIONS_LIMIT_BYTES:
        raise DamagedHeif
    data = yield from _bytes(box.start, size_bytes)
    version, is_wide = data[0], data[3] & 1
    (count,) = struct.unpack_from(">I", data, 4)
    for found, numbers in _entries(data[8:], count, id_bytes=2 if version < 1 else 4, number_bytes=2 if is_wide else 1):
        if found == item:
            return numbers
    raise DamagedHeif


def _entries(data: bytes, count: int, *, id_bytes: int, number_bytes: int) -> Iterator[tuple[int, list[int]]]:
    """Each item and its properties' numbers; the first bit says whether a property is essential."""
    at, mask = 0, (1 << (8 * number_bytes - 1)) - 1
    for _ in range(count):
        if at + id_bytes >= len(data):
            raise DamagedHeif
        item, amount = int.from_bytes(data[at : at + id_bytes], "big"), data[at + id_bytes]
        at += id_bytes + 1
        end = at + amount * number_bytes
        if end > len(data):
            raise DamagedHeif
        parts = [data[each : each + number_bytes] for each in range(at, end, number_bytes)]
        yield item, [int.from_bytes(part, "big") & mask for part in parts]
        at = end


def _span(box: _Box) -> tuple[int, int]:
    return box.start, box.end


def _first(boxes: list[_Box], kind: bytes) -> _Box:
    found = next((each for each in boxes if each.kind == kind), None)
    if found is None:
        raise DamagedHeif
    return found


def _boxes(start: int, end: int) -> Reader[list[_Box]]:
    """All boxes between two offsets."""
    found: list[_Box] = []
    while start < end:
        if len(found) == BOXES_LIMIT:
            raise DamagedHeif
        box = yield from _box(start, end)
        found.append(box)
        start = box.end
    return found


def _find(kind: bytes, start: int, end: int | None) -> Reader[_Box]:
    """The first box of a kind at or behind an offset."""
    for _ in range(BOXES_LIMIT):
        box = yield from _box(start, end)
        if box.kind == kind:
            return box
        start = box.end
    raise DamagedHeif


def _box(start: int, end: int | None) -> Reader[_Box]:
    """The box at an offset, which lies before `end`. A box up to the file's end is the last one, so it is refused."""
    size, kind = struct.unpack(">I4s", (yield from _bytes(start, 8)))
    header_bytes = 8
    if size == 1:
        (size,) = yield from _numbers(">Q", start + 8)
        header_bytes = 16
    if size < header_bytes or (end is not None and start + size > end):
        raise DamagedHeif
    return _Box(kind=kind, start=start + header_bytes, end=start + size)


def _numbers(layout: str, offset: int) -> Reader[tuple[int, ...]]:
    return struct.unpack(layout, (yield from _bytes(offset, struct.calcsize(layout))))


def _bytes(offset: int, count: int) -> Reader[bytes]:
    data = yield ByteRange(offset_bytes=offset, size_bytes=count)
    if len(data) < count:
        raise DamagedHeif
    return data
