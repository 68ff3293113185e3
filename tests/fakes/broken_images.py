"""Encoded images that Pillow would not write: false headers, damage, rare pixel formats."""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width_px: int, height_px: int, rows: bytes, *, depth: int = 8, color: int = 2) -> bytes:
    """`rows`: a filter byte and the samples of each row, not compressed yet."""
    header = struct.pack(">IIBBBBB", width_px, height_px, depth, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return SIGNATURE + b"".join(png_chunk(kind, data) for kind, data in chunks)


def huge_png(width_px: int = 60_000, height_px: int = 60_000) -> bytes:
    """A header of that size before a few bytes of nothing."""
    return png(width_px, height_px, bytes(100))


def huge_gif() -> bytes:
    screen = struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02D\x01\x00;"


def png_16_bit_rgb(color: tuple[int, int, int]) -> bytes:
    row = b"\x00" + struct.pack(">6H", *(color * 2))
    return png(2, 2, row * 2, depth=16)


def exif_that_is_broken() -> bytes:
    """One orientation whose value lies outside the block, between garbage."""
    return b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12\x00\x03" + b"\xff" * 40
