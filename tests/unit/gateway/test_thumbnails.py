"""Thumbnails are read as an imaging library reads them, and nothing else is taken for one."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from services.gateway.domain.thumbnails import SIDE_PX, distance, pixels_of
from tests.fakes.broken_images import SIGNATURE, png_chunk

SHAPE = (SIDE_PX, SIDE_PX, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
GRADIENT = np.linspace(0, 255, PIXELS.size).reshape(SHAPE).astype(np.uint8)


def png(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


@pytest.mark.parametrize("pixels", [PIXELS, GRADIENT, PIXELS // 200, np.zeros(SHAPE, np.uint8)])
def test_pixels_are_those_that_pillow_wrote(pixels: np.ndarray) -> None:
    assert pixels_of(png(pixels)) == pixels.tobytes()


@pytest.mark.parametrize("kind", range(5))
def test_every_row_filter_is_undone(kind: int) -> None:
    rows = np.random.default_rng(kind).integers(0, 256, (SIDE_PX, SIDE_PX * 3), dtype=np.uint8)
    data = b"".join(bytes([kind]) + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 2, 0, 0, 0)
    made = SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")
    assert pixels_of(made) == np.asarray(Image.open(io.BytesIO(made))).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        png(PIXELS)[:200],
        png(PIXELS[:8]),
        png(PIXELS[..., 0]),
        png(PIXELS) + bytes(70_000),
        png(PIXELS).replace(b"IDAT", b"tEXt"),
        SIGNATURE + png_chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 2, 0, 0, 0)),
    ],
)
def test_anything_else_is_no_thumbnail(data: bytes) -> None:
    assert pixels_of(data) is None


def test_a_bomb_is_not_unpacked() -> None:
    header = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 2, 0, 0, 0)
    bomb = png_chunk(b"IDAT", zlib.compress(bytes(30_000_000)))
    assert len(bomb) < 64 * 1024
    assert pixels_of(SIGNATURE + png_chunk(b"IHDR", header) + bomb) is None


def test_the_distance_is_the_mean_difference_of_pixels() -> None:
    other = PIXELS.astype(int)
    other[0, 0, 0] ^= 255
    expected = np.abs(other - PIXELS).mean()
    assert distance(PIXELS.tobytes(), other.astype(np.uint8).tobytes()) == pytest.approx(expected)
    assert distance(PIXELS.tobytes(), PIXELS.tobytes()) == 0
