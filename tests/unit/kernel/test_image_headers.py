"""Sizes by headers alone: the same as Pillow's, of upright images."""

import io

import pytest
from PIL import ExifTags, Image

from services.kernel.image_headers import ImageSize, read_size, size_in
from services.kernel.images import ImageLimits, decode_rgb
from tests.fakes.broken_images import exif_that_is_broken, huge_png

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def encoded(kind: str, *, turn: int = 0, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    if turn:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = turn
        options["exif"] = exif.tobytes() if kind != "TIFF" else exif
    Image.new(mode, (33, 70)).save(out, kind, **options)
    return out.getvalue()


def upright(data: bytes) -> ImageSize:
    image = decode_rgb(data, field="image", limits=ImageLimits())
    return ImageSize(width_px=image.width, height_px=image.height)


@pytest.mark.parametrize(
    "data",
    [
        *(encoded(kind) for kind in FORMATS),
        *(encoded(kind, turn=turn) for kind in ("PNG", "JPEG", "WEBP", "TIFF") for turn in (1, 3, 5, 6, 7, 8)),
        encoded("WEBP", lossless=True),
        encoded("WEBP", mode="RGBA"),
        encoded("JPEG", progressive=True, icc_profile=b"p" * 200_000, turn=6),
        encoded("JPEG", exif=exif_that_is_broken()),
        encoded("TIFF", mode="L", compression="tiff_lzw"),
    ],
)
def test_the_size_is_that_of_the_decoded_image(data):
    assert size_in(data) == upright(data)


def test_a_huge_image_has_a_size_too():
    assert size_in(huge_png(60_000, 50_000)) == ImageSize(width_px=60_000, height_px=50_000)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_header_that_is_cut_off_has_no_size(kind):
    assert size_in(encoded(kind)[: 20 if kind != "GIF" else 8]) is None


@pytest.mark.parametrize("kind", FORMATS)
def test_no_damage_does_more_than_hide_the_size(kind):
    whole = encoded(kind, turn=6) if kind in ("PNG", "JPEG", "WEBP", "TIFF") else encoded(kind)
    for at in range(min(len(whole), 200)):
        for value in (0x00, 0x7F, 0xFF):
            size_in(whole[:at] + bytes([value]) + whole[at + 1 :])
        size_in(whole[:at])


def test_only_few_bytes_of_a_large_image_are_asked_for():
    data = encoded("PNG") + bytes(1_000_000)
    reader, asked = read_size(), 0
    wanted, size = next(reader), None
    while size is None:
        asked += wanted.size_bytes
        try:
            wanted = reader.send(data[wanted.offset_bytes : wanted.offset_bytes + wanted.size_bytes])
        except StopIteration as done:
            size = done.value
    assert size == ImageSize(width_px=33, height_px=70)
    assert asked < 1_000
