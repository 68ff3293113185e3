"""Which part of a blob a request wants: RFC 9110, single byte ranges. Pure."""

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    offset_bytes: int
    size_bytes: int


class Unsatisfiable(Exception):
    """The range lies past the end."""


def part_of(header: str, size_bytes: int) -> Part | None:
    """The part that a Range header asks for; None for all of it, also where the header means nothing or several."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.group(0).strip() == "" or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        offset_bytes, end_bytes = max(0, size_bytes - int(last)), size_bytes
    else:
        offset_bytes, end_bytes = int(first), min(size_bytes, int(last) + 1 if last else size_bytes)
        if last and int(last) < offset_bytes:
            return None
    if offset_bytes >= end_bytes:
        raise Unsatisfiable
    return Part(offset_bytes=offset_bytes, size_bytes=end_bytes - offset_bytes)
