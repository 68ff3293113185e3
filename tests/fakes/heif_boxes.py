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


def tiled(
    heic: bytes,
    tile_px: tuple[int, int],
    *,
    turns: int = 0,
    crop: bytes = b"",
    grid_px: tuple[int, int] | None = None,
) -> bytes:
    """A HEIC as phones write it, a grid of tiles: the only image of `heic` twice, beside each other.

    The whole is cropped, then turned. `grid_px`: the size that the grid itself names, if it is not that of its tiles.
    """
    width, height = 2 * tile_px[0], tile_px[1]
    grid = struct.pack(">BBBBHH", 0, 0, 0, 1, *(grid_px or (width, height)))
    tile = _content(heic, b"mdat")
    properties = [
        box(b"hvcC", _content(heic, b"hvcC")),
        ispe(*tile_px),
        ispe(width, height),
        crop or box(b"free"),
        irot(turns),
    ]
    uses = {1: b"\x81\x02", 2: b"\x81\x02", 3: b"\x03\x84\x85" if crop else b"\x03\x85"}
    entries = b"".join(struct.pack(">HB", item, len(numbers)) + numbers for item, numbers in uses.items())
    iprp = box(b"iprp", box(b"ipco", *properties), full(b"ipma", struct.pack(">I", len(uses)), entries))
    kinds = ((1, b"hvc1"), (2, b"hvc1"), (3, b"grid"))
    items = [full(b"infe", struct.pack(">HH4sB", item, 0, kind, 0), version=2) for item, kind in kinds]
    iinf = full(b"iinf", struct.pack(">H", len(items)), *items)
    iref = full(b"iref", box(b"dimg", struct.pack(">4H", 3, 2, 1, 2)))
    first = box(b"ftyp", b"heic", bytes(4), b"mif1", b"heic")

    def meta(mdat_at: int) -> bytes:
        # Item, way (1: within `idat`), file, extents, offset, length.
        places = ((1, 0, mdat_at + 8, len(tile)), (2, 0, mdat_at + 8, len(tile)), (3, 1, 0, len(grid)))
        rows = [struct.pack(">4H2I", item, way, 0, 1, offset, length) for item, way, offset, length in places]
        iloc = full(b"iloc", struct.pack(">BBH", 0x44, 0, len(rows)), *rows, version=1)
        hdlr = full(b"hdlr", bytes(4), b"pict", bytes(13))
        return full(b"meta", hdlr, full(b"pitm", struct.pack(">H", 3)), iloc, iinf, iref, iprp, box(b"idat", grid))

    return first + meta(len(first) + len(meta(0))) + box(b"mdat", tile)


def _content(data: bytes, kind: bytes) -> bytes:
    """Of the only box of that kind."""
    at = data.index(kind)
    return data[at + 4 : at - 4 + int.from_bytes(data[at - 4 : at], "big")]
