"""The size of an AVIF or HEIC by its boxes: as its decoder shows it, and None for what is damaged or hostile."""

import struct

import pytest

from services.kernel.blobs import media_type_of
from services.kernel.heif_headers import is_avif
from services.kernel.image_headers import ImageSize, read_size, size_in
from tests.fakes.heif_boxes import box, clap, full, header, irot, ispe

AVIF_BRANDS = (b"avif", b"mif1", b"miaf")


def size_px(data: bytes) -> tuple[int, int] | None:
    size = size_in(data)
    return size and (size.width_px, size.height_px)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("turns", "expected"), [(0, (300, 200)), (1, (200, 300)), (2, (300, 200)), (3, (200, 300))])
def test_quarter_turns_exchange_width_and_height(turns, expected, long):
    assert size_px(header([ispe(300, 200), irot(turns)], long=long)) == expected


def test_a_heic_is_cropped_in_the_order_of_its_properties():
    cut = clap((100, 1), (301, 2))
    assert size_px(header([ispe(300, 200), cut, irot(1)])) == (151, 100)
    assert size_px(header([ispe(300, 200), irot(1), cut])) == (100, 151)


def test_an_avif_is_not_cropped_because_its_decoder_does_not_crop():
    assert size_px(header([ispe(300, 200), clap((100, 1), (50, 1))], brands=AVIF_BRANDS)) == (300, 200)


@pytest.mark.parametrize(
    ("brands", "media_type", "avif"),
    [
        (AVIF_BRANDS, "image/avif", True),
        ((b"avis", b"msf1"), "image/avif", True),
        ((b"heic", b"mif1"), "image/heic", False),
        ((b"hevc",), "image/heic", False),
        ((b"mif1", b"avif"), "image/heif", True),
        ((b"mif1", b"heic"), "image/heif", False),
        ((b"mif1",), "image/heif", False),
    ],
)
def test_the_brands_tell_the_kind(brands, media_type, avif):
    data = header([ispe(3, 2)], brands=brands)
    assert media_type_of(data[:16]) == media_type
    assert is_avif(data) is avif
    assert size_px(data) == (3, 2)


def test_a_video_is_no_image():
    data = header([ispe(3, 2)], brands=(b"mp42", b"heic"))
    assert media_type_of(data[:16]) == ""
    assert size_in(data) is None


def test_the_primary_item_is_the_one_that_counts():
    assert size_px(header([ispe(30, 20)], items=900, primary=900)) == (30, 20)
    assert size_in(header([ispe(30, 20)], items=3, primary=4)) is None


HOSTILE = {
    "no size": header([irot(1)]),
    "no area": header([ispe(0, 7)]),
    "a crop by a fraction of nothing": header([ispe(7, 7), clap((1, 0), (1, 1))]),
    "items without end": header([ispe(7, 7)], items=40_000),
    "properties without end": header([ispe(7, 7)]).replace(ispe(7, 7), box(b"free") * 5_000),
    "boxes before the header without end": header([ispe(7, 7)])[:24] + box(b"free") * 5_000,
    "a box of no length": box(b"ftyp", b"heic", bytes(4)) + struct.pack(">I4s", 0, b"meta") + bytes(50),
    "a box larger than its parent": box(b"ftyp", b"heic", bytes(4)) + full(b"meta", struct.pack(">I4s", 999, b"pitm")),
    "a box of nearly 2 to the 64 bytes": box(b"ftyp", b"heic", bytes(4)) + struct.pack(">I4sQ", 1, b"free", 2**64 - 1),
    "numbers of properties that are not there": header([ispe(7, 7)]).replace(b"\x01\x01\x01", b"\x01\x01\x7f"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_has_no_size(name):
    assert size_in(HOSTILE[name]) is None


def test_no_damage_does_more_than_hide_or_change_the_size():
    whole = header([ispe(300, 200), irot(1), clap((100, 1), (50, 1))])
    for at in range(len(whole)):
        for value in (0x00, 0x01, 0x7F, 0xFF):
            size_in(whole[:at] + bytes([value]) + whole[at + 1 :])
        assert size_in(whole[:at]) is None


def test_pixels_before_the_header_are_passed_over():
    whole = header([ispe(300, 200)])
    data = whole[:24] + box(b"mdat", bytes(1_000_000)) + whole[24:]
    reader, asked = read_size(), 0
    try:
        wanted = next(reader)
        while True:
            asked += wanted.size_bytes
            wanted = reader.send(data[wanted.offset_bytes : wanted.offset_bytes + wanted.size_bytes])
    except StopIteration as done:
        size = done.value
    assert size == ImageSize(width_px=300, height_px=200)
    assert asked < 3_000
