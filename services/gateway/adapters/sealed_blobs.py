"""Wraps a BlobStore: blobs are sealed with the data key of the tenant whose scope they are in.

Names, digests and sizes are those of the plain bytes. A part of a blob costs the chunks that it is in. Presigned
addresses are not offered: they would give sealed bytes to whoever reads, and take bytes in clear.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from fanlight.contract.names import named, parse_digest, parse_scope
from fanlight.errors import NotFound, OutOfRange
from services.gateway.adapters.blob_files import StoredTail
from services.gateway.adapters.disk_blobs import CachedBlob
from services.gateway.adapters.seal_format import (
    CHUNK_BYTES,
    STORED_CHUNK_BYTES,
    TAG_BYTES,
    BlobOpener,
    BlobSealer,
    BrokenSeal,
    Footer,
    UnreadableBlob,
    parse_footer,
)
from services.gateway.app.data_keys import FRESH_S, DataKeys, KeysUnreadable
from services.gateway.ports import BlobSeals, Budgeted, Erased, WriteProbe, store_fault
from services.kernel.blobs import BlobInfo, BlobStore, Keep
from services.kernel.logs import get_logger

log = get_logger()

FOOTERS_LIMIT = 4_096


class SealableBlobs(BlobStore, Protocol):
    """A BlobStore that can write sealed bytes under the digest of the plain ones, and read them as they are stored."""

    async def write(
        self,
        scope: str,
        chunks: AsyncIterable[bytes],
        *,
        digest: str = "",
        size_bytes: int = 0,
        settled: bool = False,
        sealer: BlobSealer | None = None,
    ) -> BlobInfo:
        """A sealed blob replaces one in clear of the same name, and one that cannot be opened."""
        ...

    def recent(self, scope: str, digest: str) -> CachedBlob | None: ...

    async def tail(self, scope: str, digest: str, *, settled: bool = False) -> StoredTail | None:
        """Counts as a use."""
        ...

    def read_stored(self, scope: str, digest: str, *, offset_bytes: int, limit_bytes: int) -> AsyncIterator[bytes]: ...

    async def erase(self, scope: str) -> Erased: ...

    async def count_seals(self) -> BlobSeals: ...


@dataclass(frozen=True, slots=True)
class _Opened:
    opener: BlobOpener
    footer: Footer


class SealedBlobs:
    """Passes the suite in tests/contract."""

    def __init__(self, blobs: SealableBlobs, keys: DataKeys) -> None:
        self._blobs, self._keys = blobs, keys
        # Of blobs that were just looked at, as most of them are read next; until when.
        self._footers: OrderedDict[tuple[str, str], tuple[_Opened, float]] = OrderedDict()

    @property
    def fault(self) -> str:
        return store_fault(self._blobs)

    async def probe(self) -> None:
        if isinstance(self._blobs, WriteProbe):
            await self._blobs.probe()

    async def write(
        self, scope: str, chunks: AsyncIterable[bytes], *, digest: str = "", size_bytes: int = 0, settled: bool = False
    ) -> BlobInfo:
        """TenantClosed, KeysUnreadable."""
        sealer = BlobSealer(await self._keys.for_writing(scope))
        info = await self._blobs.write(
            scope, chunks, digest=digest, size_bytes=size_bytes, settled=settled, sealer=sealer
        )
        self._forget(scope, info.digest)
        return info

    async def stat(self, scope: str, digest: str) -> BlobInfo | None:
        """None also for a blob that cannot be opened, so that it is written again."""
        recent = self._blobs.recent(scope, digest)
        return recent.info if recent else await self._info(scope, digest, settled=False)

    async def settle(self, scope: str, digest: str) -> BlobInfo | None:
        if self._blobs.recent(scope, digest) is not None:
            await self._blobs.settle(scope, digest)
            if (recent := self._blobs.recent(scope, digest)) is not None:
                return recent.info
        return await self._info(scope, digest, settled=True)

    async def _info(self, scope: str, digest: str, *, settled: bool) -> BlobInfo | None:
        tail = await self._blobs.tail(scope, digest, settled=settled)
        if tail is None:
            return None
        try:
            opened = await self._open(scope, digest, tail)
        except UnreadableBlob as error:
            log.error("unreadable_blob", scope=scope, digest=digest, why=error.message)
            return None
        return opened.opener.info if opened is not None else await self._blobs.stat(scope, digest)

    async def _open(self, scope: str, digest: str, tail: StoredTail) -> _Opened | None:
        """None for a blob in clear. UnreadableBlob."""
        try:
            footer = parse_footer(tail.data, tail.stored_bytes)
            if footer is None:
                return None
            keys = await self._keys.get(scope)
            if footer.number > (keys.current if keys else 0) and not self._keys.is_destroyed(scope):
                # Perhaps another gateway has made it within the last seconds.
                keys = await self._keys.get(scope, is_fresh=True)
            if keys is None:
                raise BrokenSeal(f"it is sealed with a key of the tenant {scope}, which is destroyed")
            opened = _Opened(BlobOpener(keys, footer, scope, digest), footer)
            if len(self._footers) >= FOOTERS_LIMIT:
                self._footers.popitem(last=False)
            self._footers[scope, digest] = opened, time.monotonic() + FRESH_S
            return opened
        except BrokenSeal as error:
            raise _unreadable(digest, str(error)) from error
        except KeysUnreadable as error:
            raise _unreadable(digest, error.message) from error

    async def read(
        self, scope: str, digest: str, *, offset_bytes: int = 0, limit_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        """UnreadableBlob for one that was changed, truncated, or whose key is destroyed."""
        recent = self._blobs.recent(scope, digest)
        if recent is not None and offset_bytes <= recent.info.size_bytes:
            for piece in recent.read(offset_bytes, limit_bytes):
                yield piece
            return
        parse_scope(scope, field="scope")
        opened, size_bytes = await self._opened(scope, parse_digest(digest, field="digest"))
        if offset_bytes > size_bytes:
            raise OutOfRange(f"the blob has {size_bytes} bytes", field="offset_bytes")
        end = min(size_bytes, offset_bytes + limit_bytes) if limit_bytes else size_bytes
        if offset_bytes == end:
            return
        span = (
            self._read_sealed(opened, offset_bytes, end)
            if opened
            else self._read_clear(scope, digest, offset_bytes, end, size_bytes)
        )
        async for chunk in span:
            yield chunk

    async def _opened(self, scope: str, digest: str) -> tuple[_Opened | None, int]:
        """With its size; None for a blob in clear. NotFound, UnreadableBlob."""
        opened, until_s = self._footers.get((scope, digest), (None, 0.0))
        if opened is not None and until_s > time.monotonic():
            return opened, opened.footer.size_bytes
        tail = await self._blobs.tail(scope, digest)
        if tail is None:
            raise NotFound(f"no blob {digest}", field="digest")
        opened = await self._open(scope, digest, tail)
        return opened, opened.footer.size_bytes if opened else tail.stored_bytes

    async def _read_sealed(self, opened: _Opened, offset_bytes: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from the offset up to the end, which is after it."""
        info, index = opened.opener.info, offset_bytes // CHUNK_BYTES
        last = (end - 1) // CHUNK_BYTES
        stored_end = min((last + 1) * STORED_CHUNK_BYTES, info.size_bytes + _tags_of(info.size_bytes))
        begin = index * STORED_CHUNK_BYTES
        held, left = b"", stored_end - begin
        async for part in self._blobs.read_stored(info.scope, info.digest, offset_bytes=begin, limit_bytes=left):
            left -= len(part)
            rest, start = memoryview(held + part if held else part), index * CHUNK_BYTES
            plain = []
            while len(rest) >= STORED_CHUNK_BYTES or (rest and left <= 0):
                plain.append(self._open_chunk(opened.opener, index, rest[:STORED_CHUNK_BYTES]))
                rest = rest[STORED_CHUNK_BYTES:]
                index += 1
            held = bytes(rest)
            if plain:
                data = b"".join(plain)
                is_whole = offset_bytes <= start and start + len(data) <= end
                yield data if is_whole else data[max(0, offset_bytes - start) : end - start]
        if left > 0:
            raise _unreadable(info.digest, "it is truncated")

    def _open_chunk(self, opener: BlobOpener, index: int, sealed: memoryview) -> bytes:
        try:
            return opener.open(index, sealed)
        except BrokenSeal as error:
            self._forget(opener.info.scope, opener.info.digest)
            raise _unreadable(opener.info.digest, str(error)) from error

    def _forget(self, scope: str, digest: str) -> None:
        self._footers.pop((scope, digest), None)

    async def _read_clear(
        self, scope: str, digest: str, offset_bytes: int, end: int, size_bytes: int
    ) -> AsyncIterator[bytes]:
        """Written before blobs were sealed. A whole one is compared with its digest before its last bytes are given."""
        sha256 = hashlib.sha256() if end - offset_bytes == size_bytes else None
        held = b""
        stored = self._blobs.read_stored(scope, digest, offset_bytes=offset_bytes, limit_bytes=end - offset_bytes)
        async for chunk in stored:
            if held:
                yield held
            if sha256 is not None:
                sha256.update(chunk)
            held = chunk
        if sha256 is not None and named(sha256.hexdigest()) != digest:
            raise _unreadable(digest, "its bytes are not those of its digest")
        yield held

    async def delete(self, scope: str, digest: str) -> None:
        self._forget(scope, digest)
        await self._blobs.delete(scope, digest)

    async def sweep(self, *, older_than_s: float, now_s: float, keep: Keep) -> int:
        self._footers.clear()
        return await self._blobs.sweep(older_than_s=older_than_s, now_s=now_s, keep=keep)

    async def erase(self, scope: str) -> Erased:
        self._footers.clear()
        return await self._blobs.erase(scope)

    async def count_seals(self) -> BlobSeals:
        return await self._blobs.count_seals()


class BudgetedSealedBlobs(SealedBlobs):
    """Over a store that counts its bytes: as they are stored, a little more than the plain ones."""

    def __init__(self, blobs: SealableBlobs, keys: DataKeys, counting: Budgeted) -> None:
        super().__init__(blobs, keys)
        self._counting = counting

    @property
    def used_bytes(self) -> int:
        return self._counting.used_bytes

    def used_bytes_of(self, scope: str) -> int:
        return self._counting.used_bytes_of(scope)


def sealed_blobs(blobs: SealableBlobs, keys: DataKeys) -> SealedBlobs:
    return BudgetedSealedBlobs(blobs, keys, blobs) if isinstance(blobs, Budgeted) else SealedBlobs(blobs, keys)


def _unreadable(digest: str, why: str) -> UnreadableBlob:
    return UnreadableBlob(f"the blob {digest} cannot be read: {why}; write it again", field="digest")


def _tags_of(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES) * TAG_BYTES
