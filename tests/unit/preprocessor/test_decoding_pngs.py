"""From a PNG's bytes to pixels: the fast path gives exactly Pillow's pixels, and leaves what is not plain to Pillow."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fanlight.errors import InvalidField, TooLarge
from services.kernel.images import ImageLimits, decode_rgb
from services.preprocessor import codec
from services.preprocessor.codec import decode
from tests.fakes.broken_images import SIGNATURE, png, png_16_bit_rgb, png_chunk
from tests.fakes.synthetic_images import encoded, saved, scene

LIMITS = ImageLimits(pixels=100_000, side_px=1_000)
HEADER_BYTES = len(SIGNATURE) + 25
EXIF = Image.Exif()
EXIF[0x0112] = 6
XMP = '<rdf:RDF xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><x tiff:Orientation="6"/></rdf:RDF>'


def png_of(width: int = 67, height: int = 45, mode: str = "RGB", **options: object) -> bytes:
    return saved(Image.fromarray(scene(width, height)).convert(mode), "PNG", **options)


def with_text(name: str, text: str, *, kind: str = "text") -> bytes:
    said = PngImagePlugin.PngInfo()
    {"text": said.add_text, "itxt": said.add_itxt}[kind](name, text)
    return png_of(pnginfo=said)


def filtered(kind: int) -> bytes:
    """Random bytes as the differences that this filter would give."""
    rows = np.random.RandomState(kind).randint(0, 256, (9, 1 + 3 * 7), np.uint8)
    rows[:, 0] = kind
    return png(7, 9, rows.tobytes())


def put(data: bytes, kind: bytes, body: bytes, *, at: int) -> bytes:
    return data[:at] + png_chunk(kind, body) + data[at:]


def end_of(data: bytes) -> int:
    return data.rindex(b"IEND") - 4


PLAIN = {
    "usual": png_of(),
    "1x1": png_of(1, 1),
    "long": png_of(1, 999),
    "stored": png_of(compress_level=0),
    "of A1111": with_text("parameters", "a cat, Steps: 20"),
    "of a scanner": png_of(dpi=(300, 300)),
    "with a profile": png_of(icc_profile=b"no profile at all"),
    "with a gamma": put(png_of(), b"gAMA", (45_455).to_bytes(4, "big"), at=HEADER_BYTES),
    "with more behind it": png_of() + b"more",
    **{f"filter {kind}": filtered(kind) for kind in range(5)},
}
OTHERS = {
    "gray": png_of(mode="L"),
    "palette": png_of(mode="P"),
    "transparent": png_of(mode="RGBA"),
    "one color transparent": put(filtered(0), b"tRNS", bytes(6), at=HEADER_BYTES),
    "16 bits": png_16_bit_rgb((1_000, 2_000, 60_000)),
    "turned": png_of(exif=EXIF),
    "turned at its end": put(png_of(), b"eXIf", EXIF.tobytes()[6:], at=end_of(png_of())),
    "turned by XMP": with_text("XML:com.adobe.xmp", XMP, kind="itxt"),
    "turned by XMP as plain text": with_text("XML:com.adobe.xmp", XMP),
    "animated": encoded(
        scene(30, 20), "PNG", save_all=True, append_images=[Image.fromarray(scene(30, 20, seed=1))], duration=10
    ),
}


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_a_plain_png_has_pillows_pixels_without_pillow(data, monkeypatch):
    expected = np.asarray(decode_rgb(data, field="image", limits=LIMITS))
    monkeypatch.delattr(codec, "decode_rgb")
    assert np.array_equal(decode(data, keeps_alpha=False, limits=LIMITS), expected)


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_any_other_png_is_decoded_by_pillow(data, monkeypatch):
    expected = np.asarray(decode_rgb(data, field="image", limits=LIMITS))
    assert np.array_equal(decode(data, keeps_alpha=False, limits=LIMITS), expected)
    monkeypatch.delattr(codec, "decode_rgb")
    with pytest.raises(NameError):
        decode(data, keeps_alpha=False, limits=LIMITS)


def test_the_turned_ones_are_turned():
    for name in OTHERS:
        if name.startswith("turned"):
            assert decode(OTHERS[name], keeps_alpha=False, limits=LIMITS).shape == (67, 45, 3), name


def damaged(data: bytes) -> bytes:
    middle = data.index(b"IDAT") + 100
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "data",
    [
        png_of()[:-40],
        png_of()[:60],
        png_of()[: len(SIGNATURE) + 10],
        SIGNATURE,
        damaged(png_of()),
        png(7, 9, b"\x09" * 9 * 22),
        png(7, 9, b"\1" * 52),
    ],
    ids=["cut", "cut at once", "half a header", "nothing", "damaged", "a filter that is none", "rows missing"],
)
def test_a_damaged_png_is_refused(data):
    with pytest.raises(InvalidField) as raised:
        decode(data, keeps_alpha=False, limits=LIMITS)
    assert raised.value.field == "image"


@pytest.mark.parametrize(("width", "height"), [(1_001, 1), (400, 400)])
def test_a_png_that_is_too_large_is_refused_by_its_header(width, height):
    with pytest.raises(TooLarge):
        decode(png(width, height, b"no rows"), keeps_alpha=False, limits=LIMITS)


def test_a_png_with_too_many_chunks_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(codec, "PNG_CHUNKS_MAX", 50)
    crowded = png_of()
    for _ in range(60):
        crowded = put(crowded, b"tIME", bytes(7), at=HEADER_BYTES)
    assert zlib.crc32(b"tIME" + bytes(7)).to_bytes(4, "big") in crowded
    expected = np.asarray(decode_rgb(crowded, field="image", limits=LIMITS))
    assert np.array_equal(decode(crowded, keeps_alpha=False, limits=LIMITS), expected)
    monkeypatch.delattr(codec, "decode_rgb")
    with pytest.raises(NameError):
        decode(crowded, keeps_alpha=False, limits=LIMITS)


def test_cudas_compiler_is_not_loaded_to_read_pngs(tmp_path):
    (tmp_path / "nvidia" / "cuda_nvrtc").mkdir(parents=True)
    (tmp_path / "nvidia" / "cuda_nvrtc" / "__init__.py").touch()
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import services.preprocessor.codec\n"
        "print('nvidia.cuda_nvrtc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"
