"""The images of a request: their bytes become blobs, their digests are looked up."""

from collections.abc import AsyncIterator

from fanlight.errors import InvalidField, NotFound, TooLarge
from services.gateway.app.callers import Caller
from services.gateway.app.new_job import SourceImage
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.media import media_type_of


class SourceImages:
    def __init__(self, blobs: BlobStore, *, limit_bytes: int) -> None:
        self._blobs = blobs
        self._limit_bytes = limit_bytes

    async def keep(self, image: SourceImage, caller: Caller) -> BlobInfo:
        """InvalidField, NotFound and TooLarge name the request's field."""
        scope = caller.scope_of(image.scope, field=f"{image.field}.blob.scope")
        if image.digest:
            return await self._find(image, scope)
        self._check(image, len(image.data), media_type_of(image.data[:16]))
        return await self._blobs.write(scope, _once(image.data), settled=True)

    async def _find(self, image: SourceImage, scope: str) -> BlobInfo:
        blob = await self._blobs.settle(scope, image.digest)
        if blob is None:
            raise NotFound("there is no such blob; write it first", field=f"{image.field}.blob.digest")
        self._check(image, blob.size_bytes, blob.media_type)
        return blob

    def _check(self, image: SourceImage, size_bytes: int, media_type: str) -> None:
        if size_bytes > self._limit_bytes:
            raise TooLarge(
                f"has {size_bytes} bytes; an image may have {self._limit_bytes}",
                field=image.field,
            )
        if not media_type.startswith("image/"):
            raise InvalidField("is not a PNG, JPEG, WebP, BMP, GIF or TIFF", field=image.field)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
