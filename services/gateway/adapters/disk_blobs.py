"""The BlobStore on a local disk: files by digest under one folder, and a cache of the latest small ones in memory.

Knows no protocol.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeVar

from fanlight.errors import FanlightError, NotFound, OutOfRange, TooLarge
from services.gateway.adapters.blob_files import BlobFiles, StoredTail
from services.gateway.adapters.incoming_blobs import IncomingBlob
from services.gateway.adapters.seal_format import BlobSealer, count_seals
from services.gateway.ports import BlobSeals, Erased
from services.kernel.blobs import BlobInfo, ByteLru, Keep
from services.kernel.config import SettingsError
from services.kernel.logs import get_logger

log = get_logger()

READ_CHUNK_BYTES = 512 * 1024
THREADS = 4
# Syncs that run at the same time share the disk's work.
SETTLING_THREADS = 8
SETTLING_LIMIT = 64
# How much of a blob is buffered in memory before it is written to the disk; most blobs need one write.
BUFFER_BYTES, BUFFER_PIECES = 1024 * 1024, 1_000
# Of all incoming blobs together; above it they are written to the disk piece by piece.
BUFFER_LIMIT_BYTES = 64 * 1024 * 1024
CACHE_LIMIT, CACHE_LIMIT_BYTES = 4_096, 16 * 1024 * 1024
# Shorter than the time after which any blob may be swept: what is cached exists.
CACHED_S = 60.0

Key = tuple[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CachedBlob:
    info: BlobInfo
    pieces: Sequence[bytes]
    until_s: float

    def read(self, offset_bytes: int, limit_bytes: int) -> Iterator[bytes]:
        """From an offset that is not past the end; `limit_bytes` 0 for all of the rest."""
        left = min(self.info.size_bytes - offset_bytes, limit_bytes or self.info.size_bytes)
        for piece in self.pieces:
            part = piece[offset_bytes : offset_bytes + left] if offset_bytes or left < len(piece) else piece
            offset_bytes = max(0, offset_bytes - len(piece))
            left -= len(part)
            if part:
                yield part


class RecentBlobs:
    """The small blobs that were just written: most are read once, by a client that waits for them.

    Entries are evicted in the order of their writing, and after CACHED_S.
    """

    def __init__(self, *, limit_bytes: int = CACHE_LIMIT_BYTES, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._cache: ByteLru[Key, CachedBlob] = ByteLru(
            limit_bytes=limit_bytes, size_of=lambda blob: blob.info.size_bytes, count_limit=CACHE_LIMIT
        )

    def add(self, info: BlobInfo, pieces: Sequence[bytes]) -> None:
        self._cache.put((info.scope, info.digest), CachedBlob(info, pieces, self._now_s() + CACHED_S))

    def get(self, scope: str, digest: str) -> CachedBlob | None:
        found = self._cache.get((scope, digest), touch=False)
        if found is not None and found.until_s < self._now_s():
            self.drop(scope, digest)
            return None
        return found

    def drop(self, scope: str, digest: str) -> None:
        self._cache.drop((scope, digest))

    def clear(self) -> None:
        self._cache.clear()


class DiskBlobs:
    """Passes the suite in tests/contract. One process at a time counts the budget of a folder."""

    def __init__(self, root: Path, *, budget_bytes: int, blob_limit_bytes: int) -> None:
        """Creates and scans the folder, which blocks for as long as that takes."""
        self._files = BlobFiles(root, budget_bytes=budget_bytes, blob_limit_bytes=blob_limit_bytes)
        self._executor = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="blobs")
        self._settlers = ThreadPoolExecutor(max_workers=SETTLING_THREADS, thread_name_prefix="blobs-settle")
        self._settling: dict[Key, Future[None]] = {}
        self._recent = RecentBlobs()
        self._buffered_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._files.used_bytes

    def used_bytes_of(self, scope: str) -> int:
        return self._files.used_bytes_of(scope)

    @property
    def fault(self) -> str:
        return self._files.fault

    async def probe(self) -> None:
        """Unavailable where no bytes can be written."""
        await self._run(self._files.probe)

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
        """`sealer`: what is written to the disk is sealed; what is cached in memory is not."""
        if size_bytes > self._files.blob_limit_bytes:
            raise TooLarge(f"a blob has at most {self._files.blob_limit_bytes} bytes", field="size_bytes")
        incoming, is_stored, buffered_bytes = IncomingBlob(self._files, sealer), False, 0
        try:
            buffered_bytes = await self._take(incoming, chunks)
            finish = partial(incoming.finish, scope, digest=digest, size_bytes=size_bytes)
            # In one go on one thread: each way there and back costs the event loop more than a small blob's bytes.
            info, whole = await (self._run_settling(finish, incoming) if settled else self._run(finish))
            is_stored = True
        finally:
            self._buffered_bytes -= buffered_bytes
            if not is_stored:
                await self._run(incoming.discard)
        if not settled:
            self._begin_settling(info, incoming)
        if whole:
            self._recent.add(info, whole)
        if not settled and len(self._settling) > SETTLING_LIMIT:
            await self._wait_for(scope, info.digest)
        return info

    async def _run_settling(
        self, finish: Callable[[], tuple[BlobInfo, tuple[bytes, ...]]], incoming: IncomingBlob
    ) -> tuple[BlobInfo, tuple[bytes, ...]]:
        """NodeFault or Unavailable if the disk did not accept it."""

        def work() -> tuple[BlobInfo, tuple[bytes, ...]]:
            finished = finish()
            incoming.settle()
            return finished

        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._settlers, work))

    async def _take(self, incoming: IncomingBlob, chunks: AsyncIterable[bytes]) -> int:
        """Returns how many bytes are still buffered; the caller counts them until it drops them."""
        buffered_bytes, is_whole = 0, False
        try:
            async for chunk in chunks:
                pieces = incoming.buffer(chunk)
                buffered_bytes += len(chunk)
                self._buffered_bytes += len(chunk)
                if buffered_bytes > BUFFER_BYTES or pieces > BUFFER_PIECES or self._buffered_bytes > BUFFER_LIMIT_BYTES:
                    await self._run(incoming.flush)
                    self._buffered_bytes -= buffered_bytes
                    buffered_bytes = 0
            is_whole = True
            return buffered_bytes
        finally:
            if not is_whole:
                self._buffered_bytes -= buffered_bytes

    def _begin_settling(self, info: BlobInfo, incoming: IncomingBlob) -> None:
        """Wakes no task when it is done, because hardly any task waits for it."""
        key = (info.scope, info.digest)
        settling = self._settlers.submit(incoming.settle)
        self._settling.setdefault(key, settling)
        settling.add_done_callback(partial(self._settled, key, asyncio.get_running_loop()))

    def _settled(self, key: Key, loop: asyncio.AbstractEventLoop, settling: Future[None]) -> None:
        """Runs on the thread that synced."""
        error = settling.exception()
        if error is not None:
            reason = error.reason if isinstance(error, FanlightError) else repr(error)
            log.error("blob_sync_failed", digest=key[1], reason=reason)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._lose, key, settling)
        elif self._settling.get(key) is settling:
            del self._settling[key]

    def _lose(self, key: Key, settling: Future[None]) -> None:
        self._recent.drop(*key)
        if self._settling.get(key) is settling:
            del self._settling[key]

    def _just_written(self, scope: str, digest: str) -> CachedBlob | None:
        """None while the folder is lost: what is in memory alone is not stored."""
        return None if self._files.fault else self._recent.get(scope, digest)

    def recent(self, scope: str, digest: str) -> CachedBlob | None:
        """Its bytes in clear, where it was just written."""
        return self._just_written(scope, digest)

    async def tail(self, scope: str, digest: str, *, settled: bool = False) -> StoredTail | None:
        """Counts as a use. `settled`: durable on return."""
        if settled:
            await self._wait_for(scope, digest)
        return await self._run(partial(self._files.tail, scope, digest, settled=settled))

    def read_stored(self, scope: str, digest: str, *, offset_bytes: int, limit_bytes: int) -> AsyncIterator[bytes]:
        """As `read`, of what lies on the disk."""
        return self._read_file(scope, digest, offset_bytes, limit_bytes)

    async def erase(self, scope: str) -> Erased:
        self._recent.clear()
        return await self._run(partial(self._files.erase, scope))

    async def count_seals(self) -> BlobSeals:
        return await self._run(lambda: count_seals(self._files.tails()))

    async def stat(self, scope: str, digest: str) -> BlobInfo | None:
        recent = self._just_written(scope, digest)
        return recent.info if recent else await self._run(partial(self._files.stat, scope, digest))

    async def _wait_for(self, scope: str, digest: str) -> None:
        """NodeFault or Unavailable if the disk did not accept it."""
        settling = self._settling.get((scope, digest))
        if settling is not None:
            await asyncio.shield(asyncio.wrap_future(settling))

    async def settle(self, scope: str, digest: str) -> BlobInfo | None:
        await self._wait_for(scope, digest)
        recent = self._just_written(scope, digest)
        return recent.info if recent else await self._run(partial(self._files.stat, scope, digest, settled=True))

    async def read(
        self, scope: str, digest: str, *, offset_bytes: int = 0, limit_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        recent = self._just_written(scope, digest)
        if recent is not None and offset_bytes <= recent.info.size_bytes:
            for piece in recent.read(offset_bytes, limit_bytes):
                yield piece
            return
        async with contextlib.aclosing(self._read_file(scope, digest, offset_bytes, limit_bytes)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _read_file(
        self, scope: str, digest: str, offset_bytes: int, limit_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        file, left, chunk = await self._run(partial(self._open, scope, digest, offset_bytes, limit_bytes))
        try:
            while chunk:
                yield chunk
                left -= len(chunk)
                chunk = await self._run(partial(self._read, file, min(left, READ_CHUNK_BYTES))) if left > 0 else b""
        finally:
            if not file.closed:
                await self._run(file.close)

    async def delete(self, scope: str, digest: str) -> None:
        self._recent.drop(scope, digest)
        await self._run(partial(self._files.delete, scope, digest))

    async def sweep(self, *, older_than_s: float, now_s: float, keep: Keep) -> int:
        self._recent.clear()
        return await self._run(partial(self._files.sweep, before_s=now_s - older_than_s, keep=keep))

    def close(self) -> None:
        """Let running calls end and accept no more."""
        self._executor.shutdown()
        self._settlers.shutdown()

    def _open(self, scope: str, digest: str, offset_bytes: int, limit_bytes: int) -> tuple[FileIO, int, bytes]:
        """The file, how many bytes are to be read, and the first of them; closed if these are all."""
        with self._files.translated(), contextlib.ExitStack() as unless_more:
            file = self._files.open(scope, digest)
            if file is None:
                raise NotFound(f"no blob {digest}", field="digest")
            unless_more.enter_context(file)
            size_bytes = os.fstat(file.fileno()).st_size
            if offset_bytes > size_bytes:
                raise OutOfRange(f"the blob has {size_bytes} bytes", field="offset_bytes")
            file.seek(offset_bytes)
            left = min(size_bytes - offset_bytes, limit_bytes or size_bytes)
            chunk = file.read(min(left, READ_CHUNK_BYTES))
            if len(chunk) < left:
                unless_more.pop_all()
        return file, left, chunk

    def _read(self, file: FileIO, size_bytes: int) -> bytes:
        with self._files.translated():
            return file.read(size_bytes)

    async def _run(self, call: Callable[[], T]) -> T:
        """Run it on our threads. A cancelled caller returns at once, while the call still runs to its end."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._executor, call))


@asynccontextmanager
async def open_disk_blobs(root: Path, *, budget_bytes: int, blob_limit_bytes: int) -> AsyncIterator[DiskBlobs]:
    """The store in that folder, which is created if it does not exist. SettingsError if it cannot be used."""
    try:
        blobs = await asyncio.to_thread(DiskBlobs, root, budget_bytes=budget_bytes, blob_limit_bytes=blob_limit_bytes)
    except OSError as error:
        raise SettingsError(f"{root}: cannot be used: {error.strerror}") from error
    try:
        yield blobs
    finally:
        blobs.close()
