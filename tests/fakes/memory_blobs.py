"""The BlobStore in memory. Passes the same suite as the real ones."""

import time
from collections.abc import AsyncIterable, AsyncIterator, Callable

from fanlight.contract.names import digest_of
from fanlight.errors import InvalidField, NotFound, OutOfRange, ResourceExhausted, TooLarge
from services.gateway.ports import Erased
from services.kernel.blobs import BlobInfo, Keep, media_type_of

CHUNK_BYTES = 256 * 1024


class MemoryBlobs:
    def __init__(
        self,
        *,
        budget_bytes: int = 1 << 30,
        blob_limit_bytes: int = 1 << 28,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._now_s = now_s
        self._kept: dict[tuple[str, str], bytes] = {}
        self._used_s: dict[tuple[str, str], float] = {}
        self._budget_bytes = budget_bytes
        self._blob_limit_bytes = blob_limit_bytes
        # Bytes of the blobs, and of those being written.
        self.used_bytes = 0

    def used_bytes_of(self, scope: str) -> int:
        return sum(len(data) for (each, _), data in self._kept.items() if each == scope)

    async def write(
        self, scope: str, chunks: AsyncIterable[bytes], *, digest: str = "", size_bytes: int = 0, settled: bool = False
    ) -> BlobInfo:
        if size_bytes > self._blob_limit_bytes:
            raise TooLarge(f"a blob has at most {self._blob_limit_bytes} bytes", field="size_bytes")
        data = b""
        reserved_bytes = 0
        try:
            async for chunk in chunks:
                if len(data) + len(chunk) > self._blob_limit_bytes:
                    raise TooLarge(f"a blob has at most {self._blob_limit_bytes} bytes")
                if self.used_bytes + len(chunk) > self._budget_bytes:
                    raise ResourceExhausted("the blob budget is used up", retry_after_s=60.0)
                self.used_bytes += len(chunk)
                reserved_bytes += len(chunk)
                data += chunk
        finally:
            self.used_bytes -= reserved_bytes
        return self._keep(scope, data, digest, size_bytes)

    def put(self, data: bytes, *, scope: str = "default") -> BlobInfo:
        """Keep it at once, for tests that need a blob to be there."""
        return self._keep(scope, data, "", 0)

    def _keep(self, scope: str, data: bytes, digest: str, size_bytes: int) -> BlobInfo:
        found = digest_of(data)
        if size_bytes and len(data) != size_bytes:
            raise InvalidField(f"is {size_bytes}, but {len(data)} bytes came", field="size_bytes")
        if digest and digest != found:
            raise InvalidField(f"the bytes hash to {found}", field="digest")
        if (scope, found) not in self._kept:
            self._kept[scope, found] = data
            self.used_bytes += len(data)
        self._used_s[scope, found] = self._now_s()
        return _info(scope, found, data)

    async def stat(self, scope: str, digest: str) -> BlobInfo | None:
        data = self._kept.get((scope, digest))
        if data is None:
            return None
        self._used_s[scope, digest] = self._now_s()
        return _info(scope, digest, data)

    async def settle(self, scope: str, digest: str) -> BlobInfo | None:
        return await self.stat(scope, digest)

    async def read(
        self, scope: str, digest: str, *, offset_bytes: int = 0, limit_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        data = self._kept.get((scope, digest))
        if data is None:
            raise NotFound(f"no blob {digest}", field="digest")
        if offset_bytes > len(data):
            raise OutOfRange(f"the blob has {len(data)} bytes", field="offset_bytes")
        end = min(len(data), offset_bytes + limit_bytes) if limit_bytes else len(data)
        for start in range(offset_bytes, end, CHUNK_BYTES):
            yield data[start : min(end, start + CHUNK_BYTES)]

    async def delete(self, scope: str, digest: str) -> None:
        self.used_bytes -= len(self._kept.pop((scope, digest), b""))

    async def erase(self, scope: str) -> Erased:
        found = [key for key in self._kept if key[0] == scope]
        for key in found:
            await self.delete(*key)
        return Erased(blobs=len(found), remaining=0)

    async def sweep(self, *, older_than_s: float, now_s: float, keep: Keep) -> int:
        swept = 0
        for scope, digest in list(self._kept):
            if keep(scope, digest):
                self._used_s[scope, digest] = self._now_s()
            elif self._used_s[scope, digest] < now_s - older_than_s:
                await self.delete(scope, digest)
                swept += 1
        return swept


def _info(scope: str, digest: str, data: bytes) -> BlobInfo:
    return BlobInfo(scope=scope, digest=digest, size_bytes=len(data), media_type=media_type_of(data[:16]))
