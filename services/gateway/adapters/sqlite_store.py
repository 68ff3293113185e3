"""The JobStore in one SQLite file: survives a crash, serves exactly one gateway."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from fanlight.errors import FanlightError, Unavailable
from services.gateway.adapters.sqlite_file import Result, SqliteFile, Write, Written
from services.gateway.adapters.watchers import Watchers
from services.gateway.ports import CaughtUp, Change, New, Record

LIST_PAGE = 500

T = TypeVar("T")
_Results = list[Result]
# The buckets are those of what is written, in its order.
_Entry = tuple[tuple[str, ...], Write, asyncio.Future[Written]]


class SqliteStore:
    """Made by `open_sqlite_store`. Writes that wait at the same time share one transaction."""

    def __init__(self, file: SqliteFile, executor: ThreadPoolExecutor) -> None:
        self._file = file
        self._executor = executor
        self._loop = asyncio.get_running_loop()
        self._watchers = Watchers()
        self._waiting: list[_Entry] = []
        self._writing = False

    def close(self) -> None:
        """End the watches; the file is closed by who opened it."""
        self._watchers.close()

    async def create(self, bucket: str, key: str, value: bytes, *, after: New | None = None) -> Record:
        buckets = (bucket, after.bucket) if after else (bucket,)
        return _record(await self._write(buckets, lambda file: file.create(bucket, key, value, after)))

    async def put(self, bucket: str, key: str, value: bytes, *, revision: int) -> Record:
        return _record(await self._write((bucket,), lambda file: file.put(bucket, key, value, revision)))

    async def delete(self, bucket: str, key: str) -> None:
        await self._write((bucket,), lambda file: file.delete(bucket, key))

    async def get(self, bucket: str, key: str) -> Record | None:
        return await self._read(lambda: self._file.get(bucket, key))

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        return await self._read(lambda: self._file.list(bucket, before, limit))

    async def watch(self, bucket: str) -> AsyncIterator[Change]:
        watcher = self._watchers.add(bucket)
        try:
            page = await self.list(bucket, limit=LIST_PAGE)
            while page:
                for record in page:
                    yield record
                page = await self.list(bucket, before=page[-1].key, limit=LIST_PAGE)
            yield CaughtUp()
            async for change in watcher.changes():
                yield change
        finally:
            self._watchers.remove(bucket, watcher)

    async def _read(self, read: Callable[[], T]) -> T:
        try:
            return await self._loop.run_in_executor(self._executor, read)
        except sqlite3.Error as error:
            raise Unavailable(f"the store cannot read: {error}", retry_after_s=1.0) from error

    async def _write(self, buckets: tuple[str, ...], write: Write) -> Written:
        """Durable on return. Who is cancelled while waiting leaves the write to happen or not."""
        done: asyncio.Future[Written] = self._loop.create_future()
        self._waiting.append((buckets, write, done))
        self._flush()
        return await done

    def _flush(self) -> None:
        """Hand all that waits to the thread, unless it is busy: then it is done with the next transaction."""
        if self._writing or not self._waiting:
            return
        entries, self._waiting = self._waiting, []
        self._writing = True
        writes = [write for _, write, _ in entries]
        job = self._loop.run_in_executor(self._executor, self._file.write_all, writes)
        job.add_done_callback(lambda job: self._settle(entries, job))

    def _settle(self, entries: Sequence[_Entry], job: asyncio.Future[_Results]) -> None:
        self._writing = False
        error = job.exception()
        if error is not None:
            for _, _, done in entries:
                if not done.done():
                    done.set_exception(error)
            self._flush()
            raise error
        for (buckets, _, done), result in zip(entries, job.result(), strict=True):
            if isinstance(result, FanlightError):
                if not done.done():
                    done.set_exception(result)
                continue
            if not done.done():
                done.set_result(result)
            for bucket, change in zip(buckets, result, strict=False):
                self._watchers.tell(bucket, change)
        self._flush()


def _record(written: Written) -> Record:
    assert isinstance(written[0], Record)
    return written[0]


@asynccontextmanager
async def open_sqlite_store(path: Path) -> AsyncIterator[SqliteStore]:
    """The store in that file, which is made if it is not there. SettingsError when another gateway has it."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite") as executor:
        file = await loop.run_in_executor(executor, SqliteFile, path)
        store = SqliteStore(file, executor)
        try:
            yield store
        finally:
            store.close()
            await loop.run_in_executor(executor, file.close)
