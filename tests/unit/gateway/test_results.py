"""What a worker hands in is looked at before it is believed."""

import io
from collections.abc import AsyncIterator

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fanlight.errors import ResultRefused
from services.gateway.app.results import PREVIEW_LIMIT_BYTES, ClaimedSize, ResultChecker, is_preview
from services.gateway.domain.job import DIFFUSION, Facts
from tests.fakes.memory_blobs import MemoryBlobs

ASKED = Facts(width_px=96, height_px=64)


def encoded(kind: str, width_px: int = 96, height_px: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width_px, height_px), (200, 30, 30)).save(out, kind)
    return out.getvalue()


async def check(data: bytes, *, facts: Facts = ASKED, claimed: tuple[int, int] = (96, 64)) -> None:
    blobs = MemoryBlobs()

    async def chunks() -> AsyncIterator[bytes]:
        yield data

    blob = await blobs.write("default", chunks())
    size = ClaimedSize(width_px=claimed[0], height_px=claimed[1])
    await ResultChecker(blobs).check(DIFFUSION, facts, 0, blob, size)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_whole_images_of_the_size_asked_for_are_taken(kind: str) -> None:
    await check(encoded(kind))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_half_an_image_is_refused(kind: str) -> None:
    data = encoded(kind)
    with pytest.raises(ResultRefused, match="ends in the middle"):
        await check(data[:-3])


@pytest.mark.parametrize(
    "data", [b"not a picture at all", b"<html><script>alert(1)</script></html>", b"", b"GIF89a", b"%PDF-1.7"]
)
async def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ResultRefused, match="is no image") as refused:
        await check(data)
    assert refused.value.field == "outputs[0].blob"


@pytest.mark.parametrize("head", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x00\x00\x00\x00WEBPVP8 "])
async def test_the_beginning_of_an_image_alone_is_refused(head: bytes) -> None:
    with pytest.raises(ResultRefused, match="no sound header"):
        await check(head)


async def test_another_size_than_asked_for_is_refused() -> None:
    with pytest.raises(ResultRefused, match="96 x 64 was asked for"):
        await check(encoded("PNG", 64, 64), claimed=(64, 64))


async def test_another_size_than_the_worker_says_is_refused() -> None:
    with pytest.raises(ResultRefused, match="says another size"):
        await check(encoded("PNG"), claimed=(4_000_000_000, 64))


async def test_an_annotator_may_choose_its_size() -> None:
    await check(encoded("PNG", 64, 64), facts=Facts(), claimed=(64, 64))


async def test_an_annotator_keeps_the_size_that_the_request_names() -> None:
    asked = Facts(amounts=(("pixels", 96 * 64),))
    await check(encoded("PNG"), facts=asked)
    with pytest.raises(ResultRefused, match="6144 pixels were asked for"):
        await check(encoded("PNG", 64, 64), facts=asked, claimed=(64, 64))


async def test_more_bytes_than_the_pixels_can_have_are_refused() -> None:
    data = encoded("PNG")
    with pytest.raises(ResultRefused, match="too many for 96 x 64"):
        await check(data[:-12] + bytes(2 * 1024 * 1024) + data[-12:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_preview_is_a_small_whole_image(kind: str) -> None:
    data = encoded(kind)
    assert is_preview(data)
    assert not is_preview(data[:-3])


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded("GIF"), encoded("PNG", 4_096, 8)])
def test_another_preview_is_dropped(data: bytes) -> None:
    assert not is_preview(data)


def test_a_preview_of_too_many_bytes_is_dropped() -> None:
    data = encoded("PNG")
    assert not is_preview(data[:-12] + bytes(PREVIEW_LIMIT_BYTES) + data[-12:])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
async def test_a_provenance_longer_than_the_head_hides_no_size(kind: str) -> None:
    out = io.BytesIO()
    image = Image.new("RGB", (96, 64), (200, 30, 30))
    if kind == "PNG":
        info = PngInfo()
        info.add_text("parameters", "x" * 200_000)
        image.save(out, kind, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[0x010E] = "x" * (200_000 if kind == "WEBP" else 60_000)
        image.save(out, kind, exif=exif)
    await check(out.getvalue())
