"""Headers of AVIF and HEIC files, box by box (ISO/IEC 14496-12 and 23008-12), sound or hostile. They have no pixels."""

import struct
from collections.abc import Sequence


def box(kind: bytes, *parts: bytes, long: bool = False) -> bytes:
    """`long`: with the size in 64 bits."""
    content = b"".join(parts)
    if long:
        return struct.pack(">I4sQ", 1, kind, len(content) + 16) + content
    return struct.pack(">I4s", len(content) + 8, kind) + content


def full(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def ispe(width_px: int, height_px: int) -> bytes:
    return full(b"ispe", struct.pack(">II", width_px, height_px))


def irot(quarter_turns: int) -> bytes:
    return box(b"irot", bytes([quarter_turns]))


def clap(width: tuple[int, int], height: tuple[int, int]) -> bytes:
    """Fractions of pixels, in the middle of the image."""
    return box(b"clap", struct.pack(">8I", *width, *height, 0, 1, 0, 1))


def header(
    properties: Sequence[bytes],
    *,
    brands: Sequence[bytes] = (b"heic", b"mif1"),
    items: int = 1,
    primary: int = 1,
    long: bool = False,
) -> bytes:
    """Of a file whose items all have all of the properties. `long`: with long sizes, ids and numbers."""
    numbers = b"".join(struct.pack(">H" if long else ">B", number) for number in range(1, len(properties) + 1))
    ids = [struct.pack(">I" if long else ">H", item) for item in range(1, items + 1)]
    entries = b"".join(each + bytes([len(properties)]) + numbers for each in ids)
    ipma = full(b"ipma", struct.pack(">I", items), entries, version=int(long), flags=int(long))
    pitm = full(b"pitm", struct.pack(">I" if long else ">H", primary), version=int(long))
    iprp = box(b"iprp", box(b"ipco", *properties), ipma)
    before = box(b"ftyp", brands[0], bytes(4), *brands) + box(b"free", bytes(9), long=long)
    return before + full(b"meta", full(b"hdlr", bytes(20)), pitm, iprp)
