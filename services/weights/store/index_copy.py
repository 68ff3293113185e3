"""A copy in memory of an index whose file cannot be written, and what was written to the copy alone.

Knows SQLite's files, and nothing of what the tables mean.
"""

import contextlib
import shutil
import sqlite3
import tempfile
import urllib.parse
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from services.kernel.logs import get_logger

log = get_logger()

# What is written beyond these is lost with the process; the objects on disk say it again.
PENDING_LIMIT = 10_000
# A file that another machine writes meanwhile may be read half before and half after.
COPY_TRIES = 3
# A folder in memory comes before the one for temporary files, which may be on the same full disk.
MEMORY_FOLDER = "/dev/shm"

Row: TypeAlias = tuple[Any, ...]
# SQL and the parameters of each time that it is executed.
Statement: TypeAlias = tuple[str, Sequence[Sequence[Any]]]


def run_all(db: sqlite3.Connection, statements: Iterable[Statement]) -> list[list[Row]]:
    """Returns the rows of each statement's RETURNING."""
    answers: list[list[Row]] = []
    for sql, rows in statements:
        if " RETURNING " in sql:
            answers.append([found for row in rows for found in db.execute(sql, row).fetchall()])
        else:
            db.executemany(sql, rows)
            answers.append([])
    return answers


class IndexCopy:
    """Read again whenever the file has changed: another machine may write a store that is read-only here."""

    def __init__(self, path: Path, schema: str) -> None:
        """An empty one where there is no file, or none that can be read."""
        self._path = path
        self._schema = schema
        self.pending: deque[Sequence[Statement]] = deque(maxlen=PENDING_LIMIT)
        self._seen = self._stamps()
        self._db = self._load()

    def read(self) -> sqlite3.Connection:
        """As the file is now, with what was written to the copy."""
        seen = self._stamps()
        if seen != self._seen:
            self._db.close()
            self._seen, self._db = seen, self._load()
            with self._db:
                for statements in self.pending:
                    run_all(self._db, statements)
        return self._db

    def write(self, statements: Sequence[Statement]) -> list[list[Row]]:
        db = self.read()
        with db:
            rows = run_all(db, statements)
        self.pending.append(statements)
        return rows

    def _stamps(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in (self._path, _log_of(self._path)))

    def _load(self) -> sqlite3.Connection:
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        failure: sqlite3.Error | None = None
        for _ in range(COPY_TRIES if self._path.exists() else 0):
            try:
                _fill(memory, self._path)
                break
            except sqlite3.DatabaseError as error:
                failure = error
                memory.close()
                memory = sqlite3.connect(":memory:", check_same_thread=False)
        else:
            if failure is not None:
                memory.close()
                raise failure
        memory.executescript(self._schema)
        return memory


def _fill(memory: sqlite3.Connection, path: Path) -> None:
    try:
        _copy(f"{_uri(path)}?mode=ro", memory)
    except sqlite3.OperationalError:
        # It needs files beside it, which cannot be created.
        with _readable(path) as uri:
            _copy(uri, memory)


def _copy(uri: str, memory: sqlite3.Connection) -> None:
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        db.backup(memory)
        memory.execute("SELECT count(*) FROM sqlite_schema").fetchall()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[str]:
    """An address that SQLite reads without creating a file beside it, with the changes that are in the log only."""
    log_file = _log_of(path)
    if _stamp(log_file) is None or not log_file.stat().st_size:
        yield f"{_uri(path)}?immutable=1"
        return
    for place in (MEMORY_FOLDER, tempfile.gettempdir()):
        with contextlib.ExitStack() as until_read:
            try:
                folder = Path(until_read.enter_context(tempfile.TemporaryDirectory(dir=place)))
                for each in (path, log_file):
                    shutil.copyfile(each, folder / each.name)
            except OSError:
                continue
            yield _uri(folder / path.name)
            return
    log.warning("weights_index_log_unread", path=str(log_file))
    yield f"{_uri(path)}?immutable=1"


def _uri(path: Path) -> str:
    return f"file:{urllib.parse.quote(str(path.absolute()))}"


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
