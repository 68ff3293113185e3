"""An AVIF or HEIC comes out upright, at the size that its header names, or as an error that says what is wrong."""

import random
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fanlight.errors import FanlightError, InvalidField, NodeFault, ResourceExhausted, TooLarge
from services.kernel import heif_decoder
from services.kernel.image_headers import size_in
from services.kernel.images import ImageLimits, decode_rgb, decode_rgba, read_header
from tests.fakes.heif_boxes import clap, header, ispe, tiled
from tests.fakes.synthetic_images import encoded

LIMITS = ImageLimits(size_bytes=1_000_000, pixels=100_000, side_px=5_000)
HEIC = Path(__file__).parents[2] / "golden" / "heic"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def four_colors() -> np.ndarray:
    """(64, 96, 3) uint8: red and green above blue and white, as in the HEIC files."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:], pixels[32:, :48], pixels[32:, 48:] = RED, GREEN, BLUE, WHITE
    return pixels


def avif(pixels: np.ndarray | None = None, **options: object) -> bytes:
    return encoded(four_colors() if pixels is None else pixels, "AVIF", subsampling="4:4:4", speed=10, **options)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Of the four quarters: above left, above right, below left, below right."""
    width, height = image.size
    at = [(width // 4 * x, height // 4 * y) for y in (1, 3) for x in (1, 3)]
    return [tuple(255 * round(value / 255) for value in image.getpixel(each)) for each in at]


def decode(data: bytes) -> Image.Image:
    return decode_rgb(data, field="image", limits=LIMITS)


@pytest.mark.parametrize("data", [avif(), *((HEIC / f"{name}.heic").read_bytes() for name in ("plain", "ten_bits"))])
def test_the_pixels_are_those_of_the_image(data):
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (96, 64))
    assert corners(image) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
    ],
)
def test_an_avif_is_turned_as_its_boxes_say(orientation, expected):
    data = avif(exif=exif(orientation))
    image = decode(data)
    assert corners(image) == expected
    assert image.size == ((96, 64) if orientation < 5 else (64, 96))
    size = size_in(data)
    assert size is not None
    assert (size.width_px, size.height_px) == image.size


def test_a_heic_is_turned_once_though_boxes_and_exif_both_say_so():
    data = (HEIC / "turned.heic").read_bytes()
    image = decode(data)
    size = size_in(data)
    assert image.size == (64, 96)
    assert size is not None
    assert (size.width_px, size.height_px) == image.size
    assert corners(image) == [BLUE, RED, WHITE, GREEN]


@pytest.mark.parametrize(("turns", "size_px"), [(0, (192, 64)), (1, (64, 192)), (3, (64, 192))])
def test_a_phones_grid_of_tiles_is_one_upright_image(turns, size_px):
    data = tiled((HEIC / "plain.heic").read_bytes(), (96, 64), turns=turns)
    image, size = decode(data), size_in(data)
    assert image.size == size_px
    assert size is not None
    assert (size.width_px, size.height_px) == size_px
    # Turns are counterclockwise.
    flat = image.rotate(-90 * turns, expand=True)
    assert corners(flat.crop((0, 0, 96, 64))) == corners(flat.crop((96, 0, 192, 64))) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("width", "height", "size_px"),
    [((100, 1), (50, 1), (50, 100)), ((101, 1), (33, 1), (33, 101)), ((201, 2), (64, 1), (64, 101))],
)
def test_a_crop_of_a_heic_is_applied_before_its_turn(width, height, size_px):
    data = tiled((HEIC / "plain.heic").read_bytes(), (96, 64), turns=1, crop=clap(width, height))
    size = size_in(data)
    assert size is not None
    assert (size.width_px, size.height_px) == size_px
    assert decode(data).size == size_px


@pytest.mark.parametrize("grid_px", [(192, 63), (191, 64), (65_535, 65_535), (0, 0)])
def test_a_grid_of_another_size_than_the_header_names_is_refused(grid_px):
    with pytest.raises(InvalidField, match="damaged"):
        decode(tiled((HEIC / "plain.heic").read_bytes(), (96, 64), grid_px=grid_px))


def test_an_orientation_in_xmp_turns_nothing():
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    assert decode(avif(xmp=xmp)).size == (96, 64)


def test_a_broken_exif_block_is_ignored():
    block = exif(3)
    block[0x010E] = "a description, because Pillow leaves an orientation alone out"
    sound = avif(exif=block)
    data = sound.replace(b"MM\x00*\x00\x00\x00\x08", b"MM\x00*\xff\xff\xff\xff")
    assert data != sound
    assert corners(decode(data)) == [WHITE, BLUE, GREEN, RED]


def transparent_avif() -> bytes:
    return avif(np.dstack([four_colors(), np.repeat([[0] * 48 + [255] * 48], 64, axis=0).astype(np.uint8)]))


@pytest.mark.parametrize("data", [transparent_avif(), (HEIC / "alpha.heic").read_bytes()])
def test_transparency_is_kept_or_put_on_white(data):
    assert corners(decode(data)) == [WHITE, GREEN, WHITE, WHITE]
    kept = corners(decode_rgba(data, field="image", limits=LIMITS))
    assert [each[3] for each in kept] == [0, 255, 0, 255]


def test_of_an_animation_the_first_image_is_taken():
    still = Image.fromarray(four_colors())
    data = avif(save_all=True, append_images=[still.rotate(180)])
    assert corners(decode(data)) == [RED, GREEN, BLUE, WHITE]


SAMPLES = {"avif": avif(), "heic": (HEIC / "plain.heic").read_bytes()}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_cut_file_is_refused_with_the_field(kind):
    data = SAMPLES[kind]
    for size_bytes in (12, 100, len(data) // 2, len(data) - 20):
        with pytest.raises(InvalidField, match="damaged or truncated") as refused:
            decode(data[:size_bytes])
        assert refused.value.field == "image"


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_header_beyond_the_limits_is_refused_before_anything_is_decoded(kind, monkeypatch):
    monkeypatch.delattr(heif_decoder.subprocess, "run")
    data = SAMPLES[kind].replace(struct.pack(">II", 96, 64), struct.pack(">II", 30_000, 30_000))
    with pytest.raises(TooLarge, match="30000 x 30000") as refused:
        decode(data)
    assert refused.value.field == "image"


@pytest.mark.parametrize("brands", [(b"heic", b"mif1"), (b"avif", b"mif1")])
@pytest.mark.parametrize("items", [1, 900, 40_000])
def test_a_header_without_pixels_is_refused(brands, items):
    with pytest.raises(InvalidField, match="damaged or truncated"):
        decode(header([ispe(64, 64)], brands=brands, items=items))


def test_a_file_that_crashes_its_decoder_is_refused_and_harms_nobody():
    """An item's type that is no text: pi-heif 1.4.0 makes an invalid string of it."""
    data = (HEIC / "turned.heic").read_bytes().replace(b"Exif\x00", b"\xffxif\x00", 1)
    with pytest.raises(InvalidField, match="damaged or truncated"):
        decode(data)


def test_a_decoder_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(heif_decoder, "WAIT_LIMIT_S", 0.0)
    with pytest.raises(InvalidField, match="too long to decode"):
        decode(SAMPLES["avif"])


@pytest.mark.parametrize(
    ("end", "kind"),
    [(signal.SIGKILL, ResourceExhausted), (signal.SIGXCPU, InvalidField), (signal.SIGSEGV, InvalidField)],
)
def test_who_is_to_blame_depends_on_how_the_decoder_ended(end, kind, monkeypatch):
    ended = heif_decoder.subprocess.CompletedProcess([], -end, b"", b"")
    monkeypatch.setattr(heif_decoder.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(kind) as refused:
        decode(SAMPLES["avif"])
    assert refused.value.field == "image"


def test_the_decoder_gets_no_secret_of_the_worker(monkeypatch):
    seen = {}
    run = heif_decoder.subprocess.run

    def note(*arguments, **options):
        seen.update(options["env"])
        return run(*arguments, **options)

    monkeypatch.setenv("FANLIGHT_WORKER_JOIN_CODE", "a secret")
    monkeypatch.setattr(heif_decoder.subprocess, "run", note)
    decode(SAMPLES["avif"])
    assert set(seen) == {"PYTHONPATH", "MALLOC_ARENA_MAX"}


def test_a_worker_without_the_decoder_says_so(monkeypatch, tmp_path):
    (tmp_path / "pi_heif.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NodeFault, match="pi-heif") as refused:
        decode(SAMPLES["heic"])
    assert refused.value.field == "image"


def test_a_jpegs_header_is_not_looked_for_in_a_heic():
    assert read_header(SAMPLES["heic"], field="image", limits=LIMITS).kind != "JPEG"


@pytest.mark.parametrize("kind", SAMPLES)
def test_damaged_bytes_give_an_image_of_the_size_in_the_header_or_one_of_our_errors(kind):
    dice = random.Random(kind)
    outcomes = set()
    for _ in range(12):
        data = bytearray(SAMPLES[kind])
        for _ in range(dice.choice((1, 2, 8))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            image = decode(bytes(data))
        except FanlightError as error:
            outcomes.add(type(error))
            continue
        size = size_in(bytes(data))
        assert size is not None
        assert (size.width_px, size.height_px) == image.size
    assert outcomes <= {InvalidField, TooLarge}
