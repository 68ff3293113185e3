"""The SQLite file under `SqliteStore`: statements, and several writes in one transaction. Blocks; one thread only."""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from fanlight.errors import AlreadyExists, Conflict, FanlightError, Unavailable
from services.gateway.ports import Deleted, New, Record
from services.kernel.config import SettingsError

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    bucket TEXT NOT NULL, key TEXT NOT NULL, revision INTEGER NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (bucket, key)
)
"""

# Done inside a transaction; nothing has changed where it raises.
Written = tuple[Record | Deleted, ...]
Write = Callable[["SqliteFile"], Written]
Result = Written | FanlightError


class SqliteFile:
    def __init__(self, path: Path) -> None:
        """SettingsError when another process has the file, or when it is of a later version."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            self._prepare(path)
        except sqlite3.Error as error:
            self._connection.close()
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise SettingsError(f"{path} is in use: it serves one gateway at a time") from error
            raise SettingsError(f"{path} cannot be opened: {error}") from error

    def _prepare(self, path: Path) -> None:
        run = self._connection.execute
        # The lock is taken with the first access and kept until the process ends, however it ends.
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN EXCLUSIVE")
        version = run("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise SettingsError(f"{path} was written by a later version of Fanlight")
        run(_SCHEMA)
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        run("COMMIT")
        self._revision: int = run("SELECT coalesce(max(revision), 0) FROM records").fetchone()[0]

    def close(self) -> None:
        self._connection.close()

    def write_all(self, writes: Sequence[Write]) -> list[Result]:
        """All in one transaction, durable on return; a write that is refused leaves the others be."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            results = [self._one(write) for write in writes]
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            return [Unavailable(f"the store cannot write: {error}", retry_after_s=1.0) for _ in writes]
        return results

    def _one(self, write: Write) -> Result:
        try:
            return write(self)
        except FanlightError as error:
            return error

    def create(self, bucket: str, key: str, value: bytes, after: New | None) -> Written:
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

    def put(self, bucket: str, key: str, value: bytes, expected: int) -> Written:
        revision = self._next()
        sql = "UPDATE records SET revision = ?, value = ? WHERE bucket = ? AND key = ? AND revision = ?"
        if not self._connection.execute(sql, (revision, value, bucket, key, expected)).rowcount:
            raise Conflict(f"{bucket}/{key} has changed")
        return (Record(key=key, value=value, revision=revision),)

    def delete(self, bucket: str, key: str) -> Written:
        sql = "DELETE FROM records WHERE bucket = ? AND key = ?"
        return (Deleted(key=key),) if self._connection.execute(sql, (bucket, key)).rowcount else ()

    def get(self, bucket: str, key: str) -> Record | None:
        sql = "SELECT key, value, revision FROM records WHERE bucket = ? AND key = ?"
        row = self._connection.execute(sql, (bucket, key)).fetchone()
        return _record(row) if row else None

    def list(self, bucket: str, before: str, limit: int) -> list[Record]:
        sql = (
            "SELECT key, value, revision FROM records WHERE bucket = ? AND (? = '' OR key < ?)"
            " ORDER BY key DESC LIMIT ?"
        )
        return [_record(row) for row in self._connection.execute(sql, (bucket, before, before, limit))]

    def _next(self) -> int:
        self._revision += 1
        return self._revision


def _record(row: tuple[str, bytes, int]) -> Record:
    return Record(key=row[0], value=row[1], revision=row[2])
