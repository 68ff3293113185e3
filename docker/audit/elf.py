"""The little of the ELF format that the audit needs: soname, needed libraries, debug sections. 64-bit little-endian."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from audit.model import Elf

MAGIC = b"\x7fELF"
_SECTION = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC = struct.Struct("<qQ")
_TYPE_DYNAMIC = 6
_TYPE_NOBITS = 8
_TAG_NEEDED, _TAG_SONAME = 1, 14


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
        sections = _sections(data)
        needed, soname = _dynamic(data, sections)
    except (struct.error, IndexError, UnicodeDecodeError):
        return None
    debug = sum(s.size for s in sections if s.name.startswith((".debug_", ".zdebug_")) and s.type != _TYPE_NOBITS)
    return Elf(soname=soname, needed=frozenset(needed), debug_bytes=debug)


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


def _dynamic(data: mmap | bytes, sections: list[_Section]) -> tuple[list[str], str]:
    needed: list[str] = []
    soname = ""
    for section in sections:
        if section.type == _TYPE_DYNAMIC:
            strings = sections[section.link].offset
            for tag, value in _tags(data, section):
                if tag == _TAG_NEEDED:
                    needed.append(_text(data, strings + value))
                elif tag == _TAG_SONAME:
                    soname = _text(data, strings + value)
    return needed, soname


def _tags(data: mmap | bytes, section: _Section) -> Iterator[tuple[int, int]]:
    for offset in range(section.offset, section.offset + section.size, _DYNAMIC.size):
        tag, value = _DYNAMIC.unpack_from(data, offset)
        if tag == 0:
            return
        yield tag, value


def _text(data: mmap | bytes, offset: int) -> str:
    end = data.find(b"\0", offset)
    return data[offset:end].decode()
