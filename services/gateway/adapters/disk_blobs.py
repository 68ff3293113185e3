"""The BlobStore on a local disk: files by digest under one folder. Knows no protocol."""

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from services.gateway.adapters.blob_files import BlobFiles
from services.kernel.blobs import BlobInfo, Keep
from services.kernel.config import SettingsError
from services.kernel.errors import NotFound, OutOfRange, TooLarge

READ_CHUNK_BYTES = 256 * 1024
THREADS = 4

T = TypeVar("T")


class DiskBlobs:
    """Passes the suite in tests/contract. One process at a time counts the budget of a folder."""

    def __init__(self, root: Path, *, budget_bytes: int, blob_limit_bytes: int) -> None:
        """Makes and scans the folder, which blocks for as long as that takes."""
        self._files = BlobFiles(root, budget_bytes=budget_bytes, blob_limit_bytes=blob_limit_bytes)
        self._executor = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="blobs")

    @property
    def used_bytes(self) -> int:
        return self._files.used_bytes

    async def write(
        self, scope: str, chunks: AsyncIterable[bytes], *, digest: str = "", size_bytes: int = 0
    ) -> BlobInfo:
        if size_bytes > self._files.blob_limit_bytes:
            raise TooLarge(f"a blob has at most {self._files.blob_limit_bytes} bytes", field="size_bytes")
        incoming = self._files.incoming()
        try:
            async for chunk in chunks:
                await self._run(partial(incoming.write, chunk))
            return await self._run(partial(incoming.finish, scope, digest=digest, size_bytes=size_bytes))
        finally:
            await self._run(incoming.discard)

    async def stat(self, scope: str, digest: str) -> BlobInfo | None:
        return await self._run(partial(self._files.stat, scope, digest))

    async def read(
        self, scope: str, digest: str, *, offset_bytes: int = 0, limit_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        file, left = await self._run(partial(self._open, scope, digest, offset_bytes))
        left = min(left, limit_bytes or left)
        try:
            while left > 0 and (chunk := await self._run(partial(file.read, min(left, READ_CHUNK_BYTES)))):
                left -= len(chunk)
                yield chunk
        finally:
            await self._run(file.close)

    async def delete(self, scope: str, digest: str) -> None:
        await self._run(partial(self._files.delete, scope, digest))

    async def sweep(self, *, older_than_s: float, now_s: float, keep: Keep) -> int:
        return await self._run(partial(self._files.sweep, before_s=now_s - older_than_s, keep=keep))

    def close(self) -> None:
        """Let running calls end and take no more."""
        self._executor.shutdown()

    def _open(self, scope: str, digest: str, offset_bytes: int) -> tuple[BinaryIO, int]:
        """The file at the offset, and how many bytes follow."""
        try:
            file = self._files.path(scope, digest).open("rb", buffering=0)
        except FileNotFoundError as error:
            raise NotFound(f"no blob {digest}", field="digest") from error
        size_bytes = os.fstat(file.fileno()).st_size
        if offset_bytes > size_bytes:
            file.close()
            raise OutOfRange(f"the blob has {size_bytes} bytes", field="offset_bytes")
        file.seek(offset_bytes)
        return file, size_bytes - offset_bytes

    async def _run(self, call: Callable[[], T]) -> T:
        """Run it on a thread of ours. A cancelled caller goes at once, and the call still runs to its end."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._executor, call))


@asynccontextmanager
async def open_disk_blobs(root: Path, *, budget_bytes: int, blob_limit_bytes: int) -> AsyncIterator[DiskBlobs]:
    """The store in that folder, which is made if it is not there. SettingsError where it cannot be."""
    try:
        blobs = await asyncio.to_thread(DiskBlobs, root, budget_bytes=budget_bytes, blob_limit_bytes=blob_limit_bytes)
    except OSError as error:
        raise SettingsError(f"{root}: cannot be used: {error.strerror}") from error
    try:
        yield blobs
    finally:
        blobs.close()
