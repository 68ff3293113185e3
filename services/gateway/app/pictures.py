"""The pictures of a request: their bytes become blobs, their digests are looked up."""

from collections.abc import AsyncIterator

from services.gateway.app.callers import Caller
from services.gateway.app.new_job import Picture
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.errors import InvalidField, NotFound, TooLarge
from services.kernel.media import media_type_of


class Pictures:
    def __init__(self, blobs: BlobStore, *, limit_bytes: int) -> None:
        self._blobs = blobs
        self._limit_bytes = limit_bytes

    async def keep(self, picture: Picture, caller: Caller) -> BlobInfo:
        """InvalidField, NotFound and TooLarge name the request's field."""
        scope = caller.scope_of(picture.scope, field=f"{picture.field}.blob.scope")
        if picture.digest:
            return await self._find(picture, scope)
        self._check(picture, len(picture.data), media_type_of(picture.data[:16]))
        return await self._blobs.write(scope, _once(picture.data), settled=True)

    async def _find(self, picture: Picture, scope: str) -> BlobInfo:
        blob = await self._blobs.settle(scope, picture.digest)
        if blob is None:
            raise NotFound("there is no such blob; write it first", field=f"{picture.field}.blob.digest")
        self._check(picture, blob.size_bytes, blob.media_type)
        return blob

    def _check(self, picture: Picture, size_bytes: int, media_type: str) -> None:
        if size_bytes > self._limit_bytes:
            raise TooLarge(
                f"has {size_bytes} bytes; a picture may have {self._limit_bytes}",
                field=picture.field,
            )
        if not media_type.startswith("image/"):
            raise InvalidField("is no PNG, JPEG, WebP, BMP, GIF or TIFF", field=picture.field)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
