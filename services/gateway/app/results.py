"""Looks at what a worker hands in before it is believed: an image of a known format, whole, and of the size asked for.

Reads the first and last bytes only; decodes no pixel.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from fanlight.contract.needs import PIXELS
from fanlight.errors import ResultRefused
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Facts
from services.kernel.blobs import BlobInfo, BlobStore, media_type_of
from services.kernel.image_headers import ImageSize, read_size, size_in

# Enough for nearly all headers; what lies behind is read where it is needed.
HEAD_BYTES = 64 * 1024
TAIL_BYTES = 12
SIDE_LIMIT_PX = 16_384
# No encoded image is larger than its pixels with four channels of 16 bits and so much metadata.
PIXEL_BYTES = 8
METADATA_LIMIT_BYTES = 1024 * 1024
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
PREVIEW_LIMIT_BYTES = 64 * 1024
PREVIEW_SIDE_LIMIT_PX = 2_048
# Whose results are images. A new stage that makes images belongs here too.
IMAGE_STAGES = (PREPROCESS, DIFFUSION)
FORMATS = ("image/png", "image/jpeg", "image/webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedSize:
    """What the worker says of an output."""

    width_px: int
    height_px: int


def is_preview(data: bytes) -> bool:
    """Whether a preview is a small, whole image; others are dropped."""
    media_type, size = media_type_of(data[:16]), size_in(data)
    if media_type not in FORMATS or size is None or max(size.width_px, size.height_px) > PREVIEW_SIDE_LIMIT_PX:
        return False
    return len(data) <= PREVIEW_LIMIT_BYTES and _is_whole(media_type, data, data[-TAIL_BYTES:], len(data))


class ResultChecker:
    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def check(self, stage: str, facts: Facts, index: int, blob: BlobInfo, claimed: ClaimedSize) -> None:
        """ResultRefused, with the output's field, for what cannot be a result of the request.

        Of other stages than those that make images nothing is known.
        """
        if stage not in IMAGE_STAGES:
            return
        field = f"outputs[{index}]"
        head = await self._read(blob, 0, HEAD_BYTES)
        media_type = media_type_of(head[:16])
        if media_type not in FORMATS:
            raise ResultRefused(f"is no image but {media_type or 'of an unknown format'}", field=f"{field}.blob")
        size = await self._size(blob, head)
        if size is None or max(size.width_px, size.height_px) > SIDE_LIMIT_PX:
            raise ResultRefused(f"has no sound header of {media_type}", field=f"{field}.blob")
        tail = await self._read(blob, max(0, blob.size_bytes - TAIL_BYTES), TAIL_BYTES)
        if not _is_whole(media_type, head, tail, blob.size_bytes):
            raise ResultRefused(f"ends in the middle of its {media_type}", field=f"{field}.blob")
        if (claimed.width_px, claimed.height_px) != (size.width_px, size.height_px):
            raise ResultRefused(f"is {_shown(size)}, and the worker says another size", field=f"{field}.width_px")
        _check_asked(facts, size, field)
        if blob.size_bytes > size.width_px * size.height_px * PIXEL_BYTES + METADATA_LIMIT_BYTES:
            raise ResultRefused(f"has {blob.size_bytes} bytes, too many for {_shown(size)}", field=f"{field}.blob")

    async def _size(self, blob: BlobInfo, head: bytes) -> ImageSize | None:
        """Of the upright image; reads on where what tells it lies behind the head, as behind a long provenance."""
        reader = read_size()
        wanted = next(reader)
        try:
            while True:
                end = wanted.offset_bytes + wanted.size_bytes
                if end <= len(head) or wanted.offset_bytes >= blob.size_bytes:
                    data = head[wanted.offset_bytes : end]
                else:
                    data = await self._read(blob, wanted.offset_bytes, wanted.size_bytes)
                wanted = reader.send(data)
        except StopIteration as done:
            size: ImageSize | None = done.value
            return size

    async def _read(self, blob: BlobInfo, offset_bytes: int, limit_bytes: int) -> bytes:
        chunks = self._blobs.read(blob.scope, blob.digest, offset_bytes=offset_bytes, limit_bytes=limit_bytes)
        return b"".join([chunk async for chunk in chunks])[:limit_bytes]


def _check_asked(facts: Facts, size: ImageSize, field: str) -> None:
    """Of annotators the request fixes no size, unless it names one; of images it always does."""
    pixels = dict(facts.amounts).get(PIXELS, 0)
    asked = facts.result_size_px or ((facts.width_px, facts.height_px) if facts.width_px else None)
    if asked is None and pixels and size.width_px * size.height_px != pixels:
        raise ResultRefused(f"is {_shown(size)}; {pixels} pixels were asked for", field=field)
    if asked is not None and (size.width_px, size.height_px) != asked:
        raise ResultRefused(f"is {_shown(size)}; {asked[0]} x {asked[1]} was asked for", field=field)


def _is_whole(media_type: str, head: bytes, tail: bytes, size_bytes: int) -> bool:
    """Whether the last bytes are the format's end."""
    ends: Mapping[str, bool] = {
        "image/png": tail.endswith(_PNG_END),
        # Some encoders pad with zeros.
        "image/jpeg": tail.rstrip(b"\x00").endswith(_JPEG_END),
        "image/webp": len(head) > 8 and struct.unpack("<I", head[4:8])[0] + 8 in (size_bytes, size_bytes - 1),
    }
    return ends[media_type]


def _shown(size: ImageSize) -> str:
    return f"{size.width_px} x {size.height_px}"
