"""The little of the ELF format that the audit needs: soname, needed libraries, debug sections. 64-bit little-endian."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from .model import Elf

MAGIC = b"\x7fELF"
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_SECTION_SYMBOLS, _SECTION_EMPTY = 2, 8
_SEGMENT_LOADED, _SEGMENT_DYNAMIC = 1, 2
_TAG_NEEDED, _TAG_STRINGS, _TAG_SONAME = 1, 5, 14
# Stripping a smaller symbol table is not worth a line.
SYMBOLS_BYTES_MIN = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    type: int
    offset: int
    size: int
    link: int


def read_elf(data: mmap | bytes) -> Elf | None:
    """None where it is no ELF file that we understand."""
    if data[:6] != MAGIC + b"\x02\x01":
        return None
    try:
        debug_bytes = _debug_bytes(_sections(data))
        needed, soname = _dynamic(data)
    except (struct.error, IndexError, UnicodeDecodeError):
        return None
    return Elf(soname=soname, needed=frozenset(needed), debug_bytes=debug_bytes)


def _debug_bytes(sections: list[_Section]) -> int:
    """What `strip` would take: debug sections, and the symbol tables that no loader reads where they are large."""
    names = (".debug_", ".zdebug_")
    debug = sum(s.size for s in sections if s.name.startswith(names) and s.type != _SECTION_EMPTY)
    symbols = sum(s.size + sections[s.link].size for s in sections if s.type == _SECTION_SYMBOLS)
    return debug + (symbols if symbols >= SYMBOLS_BYTES_MIN else 0)


def _sections(data: mmap | bytes) -> list[_Section]:
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    if not offset or not count or size < _SECTION.size:
        return []
    rows = [_SECTION.unpack_from(data, offset + index * size) for index in range(count)]
    names_offset = rows[names_index][4]
    return [
        _Section(_text(data, names_offset + row[0]), row[1], offset=row[4], size=row[5], link=row[6]) for row in rows
    ]


def _dynamic(data: mmap | bytes) -> tuple[list[str], str]:
    """Needed libraries and soname as the loader finds them: by segments, which no `strip` takes away."""
    segments = _segments(data)
    tags = [tag for kind, offset, _, size in segments if kind == _SEGMENT_DYNAMIC for tag in _tags(data, offset, size)]
    at = next((value for tag, value in tags if tag == _TAG_STRINGS), 0)
    loaded = [each for each in segments if each[0] == _SEGMENT_LOADED]
    strings = next((at - address + offset for _, offset, address, size in loaded if address <= at < address + size), 0)
    needed = [_text(data, strings + value) for tag, value in tags if tag == _TAG_NEEDED]
    return needed, next((_text(data, strings + value) for tag, value in tags if tag == _TAG_SONAME), "")


def _segments(data: mmap | bytes) -> list[tuple[int, int, int, int]]:
    """Type, offset in the file, address and size in the file of each."""
    (begin,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    if size < _SEGMENT.size:
        return []
    rows = [_SEGMENT.unpack_from(data, begin + index * size) for index in range(count)]
    return [(row[0], row[2], row[3], row[5]) for row in rows]


def _tags(data: mmap | bytes, begin: int, size: int) -> Iterator[tuple[int, int]]:
    for offset in range(begin, begin + size, _DYNAMIC.size):
        tag, value = _DYNAMIC.unpack_from(data, offset)
        if tag == 0:
            return
        yield tag, value


def _text(data: mmap | bytes, offset: int) -> str:
    end = data.find(b"\0", offset)
    return data[offset:end].decode()
