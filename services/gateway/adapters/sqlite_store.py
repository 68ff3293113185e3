"""The RecordStore in one SQLite file: survives a crash, serves exactly one gateway.

SqliteFile has the statements and blocks, on one thread; SqliteStore puts waiting writes into one transaction. Watchers
is for every store of this process.
"""

import asyncio
import contextlib
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from fanlight.errors import AlreadyExists, Conflict, FanlightError, Unavailable
from services.gateway.adapters.sqlite_guard import ADVICE, SPOILED, FileGuard, FileLost, code_of, why_not
from services.gateway.ports import (
    CaughtUp,
    Change,
    Deleted,
    NewRecord,
    Record,
    RecordStore,
    commits_together,
    store_fault,
)
from services.kernel.config import SettingsError
from services.kernel.logs import get_logger

log = get_logger()

SCHEMA_VERSION = 1

TIMEOUT_S = 10.0
RETRY_AFTER_S = 5.0
LIST_PAGE = 500
# How long after a check of the file reads and writes need none. A file that goes right after a write takes it along
# anyway; and the calls of the system, in each of which the thread gives way to others, cost a busy gateway 5 %.
CHECK_READS_S, CHECK_WRITES_S = 1.0, 0.05

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    bucket TEXT NOT NULL, key TEXT NOT NULL, revision INTEGER NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (bucket, key)
)
"""

T = TypeVar("T")

# Runs inside a transaction; if it raises, it has changed nothing.
Written = tuple[Record | Deleted, ...]
Write = Callable[["SqliteFile"], Written]
Result = Written | FanlightError


class SqliteFile:
    def __init__(self, path: Path) -> None:
        """Blocks. SettingsError if the file cannot be used: by this process, in this version, or at all."""
        self._path = path
        # Why the file is not used any more; empty while it is.
        self.fault = ""
        self._checked_s = 0.0
        with contextlib.ExitStack() as unless_ready:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)
                unless_ready.callback(self._connection.close)
                self._prepare(path)
                self._guard = FileGuard(path)
            except (sqlite3.Error, OSError) as error:
                raise SettingsError(why_not(path, error)) from error
            unless_ready.pop_all()

    def _prepare(self, path: Path) -> None:
        run = self._connection.execute
        # The lock is taken at the first access and released when the process ends, however it ends.
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN EXCLUSIVE")
        version = run("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise SettingsError(f"{path} was written by a later version of Fanlight")
        run(_SCHEMA)
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        # So that no copy of this file is taken for it.
        run(f"PRAGMA application_id = {secrets.randbelow(2**31)}")
        run("COMMIT")
        _, logged, written = run("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if logged != written:
            raise sqlite3.OperationalError("its log cannot be written back into it")
        # What is damaged stops the start in one line, rather than a watch later.
        (sound,) = run("PRAGMA quick_check(1)").fetchone()
        if sound != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {' '.join(str(sound).split())}")
        self._revision: int = run("SELECT coalesce(max(revision), 0) FROM records").fetchone()[0]

    def close(self) -> None:
        self._connection.close()
        self._guard.close()

    def check(self) -> None:
        """Unavailable where the file is not the one that was opened. Notes the fault, and that it has gone."""
        self._checked_s = time.monotonic()
        try:
            self._guard.check()
        except FileLost as error:
            self._note_fault(str(error))
            raise Unavailable(self.fault, retry_after_s=RETRY_AFTER_S) from error
        if self.fault:
            log.warning("store_file_found", path=str(self._path))
            self.fault = ""

    def check_after(self, checked_s: float) -> None:
        """As `check`, where the last one is so long ago or found a fault."""
        if self.fault or time.monotonic() - self._checked_s > checked_s:
            self.check()

    def _note_fault(self, why: str) -> None:
        if why != self.fault:
            log.error("store_file_lost", path=str(self._path), why=why)
        self.fault = why

    def failure_of(self, error: sqlite3.Error, doing: str) -> Unavailable:
        """The same error as ours."""
        if code_of(error) in SPOILED:
            self._note_fault(f"{self._path} is damaged: {error}; {ADVICE}")
            return Unavailable(self.fault, retry_after_s=RETRY_AFTER_S)
        retry_after_s = RETRY_AFTER_S if code_of(error) == sqlite3.SQLITE_FULL else 1.0
        # SQLite's own words do not name the file, nor what its system said.
        return Unavailable(f"the store cannot {doing}: {error} ({self._path})", retry_after_s=retry_after_s)

    def write_all(self, writes: Sequence[Write]) -> list[Result]:
        """All in one transaction, durable on return; a refused write does not affect the others."""
        try:
            self.check_after(CHECK_WRITES_S)
            self._connection.execute("BEGIN IMMEDIATE")
            results = [self._one(write) for write in writes]
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            return [self.failure_of(error, "write") for _ in writes]
        except Unavailable as error:
            return [error for _ in writes]
        return results

    def _one(self, write: Write) -> Result:
        try:
            return write(self)
        except FanlightError as error:
            return error

    def create(self, bucket: str, key: str, value: bytes, after: NewRecord | None) -> Written:
        """The record, then the one before it."""
        if after is None:
            return (self._create(bucket, key, value),)
        if self.get(bucket, key):
            raise AlreadyExists(f"{bucket}/{key} exists")
        before = self._create(after.bucket, after.key, after.value)
        return self._create(bucket, key, value), before

    def _create(self, bucket: str, key: str, value: bytes) -> Record:
        revision = self._next()
        sql = "INSERT INTO records (bucket, key, revision, value) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
        if not self._connection.execute(sql, (bucket, key, revision, value)).rowcount:
            raise AlreadyExists(f"{bucket}/{key} exists")
        return Record(key=key, value=value, revision=revision)

    def put(self, bucket: str, key: str, value: bytes, expected: int, after: NewRecord | None) -> Written:
        """The record, then the one before it."""
        present = self.get(bucket, key) if after is not None else None
        if after is not None and (present is None or present.revision != expected):
            raise Conflict(f"{bucket}/{key} has changed")
        before = self._before(after)
        revision = self._next()
        sql = "UPDATE records SET revision = ?, value = ? WHERE bucket = ? AND key = ? AND revision = ?"
        if not self._connection.execute(sql, (revision, value, bucket, key, expected)).rowcount:
            raise Conflict(f"{bucket}/{key} has changed")
        return Record(key=key, value=value, revision=revision), *before

    def delete(self, bucket: str, key: str, after: NewRecord | None) -> Written:
        """The deletion, then the record before it."""
        before = self._before(after)
        sql = "DELETE FROM records WHERE bucket = ? AND key = ?"
        is_gone = self._connection.execute(sql, (bucket, key)).rowcount
        return (Deleted(key=key), *before) if is_gone or before else ()

    def _before(self, after: NewRecord | None) -> tuple[Record, ...]:
        return (self._create(after.bucket, after.key, after.value),) if after is not None else ()

    def get(self, bucket: str, key: str) -> Record | None:
        sql = "SELECT key, value, revision FROM records WHERE bucket = ? AND key = ?"
        row = self._connection.execute(sql, (bucket, key)).fetchone()
        return _from_row(row) if row else None

    def list(self, bucket: str, before: str, limit: int) -> list[Record]:
        sql = (
            "SELECT key, value, revision FROM records WHERE bucket = ? AND (? = '' OR key < ?)"
            " ORDER BY key DESC LIMIT ?"
        )
        return [_from_row(row) for row in self._connection.execute(sql, (bucket, before, before, limit))]

    def _next(self) -> int:
        self._revision += 1
        return self._revision


def _from_row(row: tuple[str, bytes, int]) -> Record:
    return Record(key=row[0], value=row[1], revision=row[2])


_Results = list[Result]
# The buckets of the written records, in their order.
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

    @property
    def commits_together(self) -> bool:
        return True

    @property
    def fault(self) -> str:
        """As last seen by a call; empty while the file is the one that was opened."""
        return self._file.fault

    def close(self) -> None:
        """End the watches; the file is closed by its opener."""
        self._watchers.close()

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        buckets = (bucket, after.bucket) if after else (bucket,)
        return _first_record(await self._write(buckets, lambda file: file.create(bucket, key, value, after)))

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        buckets = (bucket, after.bucket) if after else (bucket,)
        return _first_record(await self._write(buckets, lambda file: file.put(bucket, key, value, revision, after)))

    async def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        buckets = (bucket, after.bucket) if after else (bucket,)
        await self._write(buckets, lambda file: file.delete(bucket, key, after))

    async def get(self, bucket: str, key: str) -> Record | None:
        return await self._read(lambda: self._file.get(bucket, key))

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        return await self._read(lambda: self._file.list(bucket, before, limit))

    async def watch(self, bucket: str) -> AsyncIterator[Change]:
        watcher = self._watchers.add(bucket)
        try:
            page = await self._page(bucket, "")
            while page:
                for record in page:
                    yield record
                page = await self._page(bucket, page[-1].key)
            yield CaughtUp()
            async for change in watcher.changes():
                yield change
        finally:
            self._watchers.remove(bucket, watcher)

    async def _page(self, bucket: str, before: str) -> Sequence[Record]:
        """Retries, because a watch has no caller to report an error to."""
        while True:
            try:
                return await self.list(bucket, before=before, limit=LIST_PAGE)
            except Unavailable as error:
                log.info("store_not_ready", bucket=bucket, message=error.message)
                await asyncio.sleep(error.retry_after_s or 1.0)

    async def _read(self, read: Callable[[], T]) -> T:
        def checked() -> T:
            self._file.check_after(CHECK_READS_S)
            return read()

        try:
            return await self._loop.run_in_executor(self._executor, checked)
        except sqlite3.Error as error:
            raise self._file.failure_of(error, "read") from error

    async def _write(self, buckets: tuple[str, ...], write: Write) -> Written:
        """Durable on return. If the caller is cancelled, the write may still happen."""
        done: asyncio.Future[Written] = self._loop.create_future()
        self._waiting.append((buckets, write, done))
        self._flush()
        return await done

    def _flush(self) -> None:
        """Give all waiting writes to the thread; if it is busy, they go into the next transaction."""
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
                self._watchers.notify(bucket, change)
        self._flush()


def _first_record(written: Written) -> Record:
    assert isinstance(written[0], Record)
    return written[0]


@asynccontextmanager
async def open_sqlite_store(path: Path) -> AsyncIterator[SqliteStore]:
    """The store in that file, which is created if it does not exist. SettingsError if another gateway uses it."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="sqlite") as executor:
        file = await loop.run_in_executor(executor, SqliteFile, path)
        store = SqliteStore(file, executor)
        try:
            yield store
        finally:
            store.close()
            await loop.run_in_executor(executor, file.close)


class TimeoutStore:
    """Wraps a store with a timeout for each call, so that a hanging disk does not hang the gateway.

    Unavailable after the timeout. The call may still take effect later; compare-and-set makes that harmless.
    """

    def __init__(self, store: RecordStore, *, timeout_s: float = TIMEOUT_S) -> None:
        self._store = store
        self._timeout_s = timeout_s

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        return await self._with_timeout(self._store.create(bucket, key, value, after=after))

    async def get(self, bucket: str, key: str) -> Record | None:
        return await self._with_timeout(self._store.get(bucket, key))

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        return await self._with_timeout(self._store.put(bucket, key, value, revision=revision, after=after))

    async def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        await self._with_timeout(self._store.delete(bucket, key, after=after))

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        return await self._with_timeout(self._store.list(bucket, before=before, limit=limit))

    def watch(self, bucket: str) -> AsyncIterator[Change]:
        return self._store.watch(bucket)

    @property
    def fault(self) -> str:
        return store_fault(self._store)

    @property
    def commits_together(self) -> bool:
        return commits_together(self._store)

    async def _with_timeout(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except TimeoutError as error:
            message = f"the store did not answer within {self._timeout_s:g} s"
            raise Unavailable(message, retry_after_s=RETRY_AFTER_S) from error


class Watcher:
    """Changes of one bucket for one reader. Its backlog is bounded by the number of keys."""

    def __init__(self) -> None:
        # Undelivered: the last change of each key.
        self._pending: dict[str, Record | Deleted] = {}
        self._woken = asyncio.Event()
        self._closed = False

    def notify(self, change: Record | Deleted) -> None:
        self._pending.pop(change.key, None)
        self._pending[change.key] = change
        self._woken.set()

    def close(self) -> None:
        self._closed = True
        self._woken.set()

    async def changes(self) -> AsyncIterator[Record | Deleted]:
        """Ends when closed."""
        while not self._closed:
            await self._woken.wait()
            self._woken.clear()
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))


class Watchers:
    """The watchers of a store, by bucket."""

    def __init__(self) -> None:
        self._watchers: dict[str, list[Watcher]] = {}

    def add(self, bucket: str) -> Watcher:
        watcher = Watcher()
        self._watchers.setdefault(bucket, []).append(watcher)
        return watcher

    def remove(self, bucket: str, watcher: Watcher) -> None:
        self._watchers[bucket].remove(watcher)

    def notify(self, bucket: str, change: Record | Deleted) -> None:
        for watcher in self._watchers.get(bucket, ()):
            watcher.notify(change)

    def close(self) -> None:
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.close()
