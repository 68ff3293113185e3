"""The index of the store's objects, in one SQLite file shared by all processes.

The objects on disk are the truth: what the index loses is found again from them.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fanlight.errors import InvalidField, NodeFault, Unavailable
from services.kernel.disks import RETRY_AFTER_S, UNWRITABLE, sqlite_code
from services.kernel.logs import get_logger
from services.weights.planning.plan import Holdings
from services.weights.references.manifest import MALFORMED, Manifest, TensorTable, manifest_from_json
from services.weights.store.index_copy import IndexCopy, Row, Statement, run_all

log = get_logger()
Parsed = TypeVar("Parsed")

BUSY_TIMEOUT_S = 30.0
INDEX_FILE = "index.sqlite"
# How often the file is tried again while a copy in memory takes its place.
FILE_AGAIN_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    sha256 TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, autov2 TEXT NOT NULL, autov3 TEXT NOT NULL DEFAULT '',
    component TEXT NOT NULL DEFAULT '', used_s REAL NOT NULL, is_pinned INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS objects_component ON objects (component);
CREATE TABLE IF NOT EXISTS aliases (sha256 TEXT PRIMARY KEY, object TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tensors (sha256 TEXT NOT NULL, object TEXT NOT NULL, begin INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL, PRIMARY KEY (sha256, object, begin)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tensors_object ON tensors (object);
CREATE TABLE IF NOT EXISTS tables (sha256 TEXT PRIMARY KEY, table_json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS origins (object TEXT NOT NULL, file TEXT NOT NULL, PRIMARY KEY (object, file));
CREATE TABLE IF NOT EXISTS links (view TEXT NOT NULL, link TEXT NOT NULL, object TEXT NOT NULL,
    PRIMARY KEY (view, link));
CREATE TABLE IF NOT EXISTS sources (source TEXT PRIMARY KEY, sha256 TEXT NOT NULL, etag TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS manifests (reference TEXT PRIMARY KEY, manifest_json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS other_names (path TEXT PRIMARY KEY, view TEXT NOT NULL, object TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS names (reference TEXT PRIMARY KEY, view TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS traffic (day TEXT PRIMARY KEY, bytes INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRow:
    sha256: str
    size_bytes: int
    autov2: str
    autov3: str
    component: str
    used_s: float
    is_pinned: bool


class Index:
    """Every method is one transaction and may block for BUSY_TIMEOUT_S; do not call it on the event loop.

    Where the file cannot be written, because its disk is full or read-only or it is another user's, a copy in memory
    takes its place. What is written then is written to the file as soon as that is possible; if it never is, the next
    process finds it again from the objects. Unavailable where another process holds the file's lock for too long.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._copy: IndexCopy | None = None
        self._file_due_s = 0.0
        try:
            with self._file() as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            self._use_copy(error)

    @property
    def is_in_memory(self) -> bool:
        """Whether the file cannot be written, as last seen."""
        return self._copy is not None

    @contextlib.contextmanager
    def _file(self) -> Iterator[sqlite3.Connection]:
        """One transaction on the file."""
        db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S)
        try:
            db.execute("PRAGMA synchronous=NORMAL")
            with db:
                yield db
        finally:
            db.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._copy is None:
            db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S)
            try:
                # Opens all files that a read needs, so that nothing fails later for want of them.
                db.execute("SELECT 1 FROM objects LIMIT 1").fetchall()
            except sqlite3.OperationalError as error:
                db.close()
                self._use_copy(error)
            else:
                with contextlib.closing(db):
                    yield db
                return
        with self._lock:
            copy = self._copy
            if copy is not None:
                yield copy.read()
                return
        # Another thread has found the file usable meanwhile.
        with self._file() as db:
            yield db

    def _write(self, *statements: Statement) -> list[list[Row]]:
        """In one transaction; returns the rows of each statement's RETURNING."""
        if self._copy is None:
            try:
                with self._file() as db:
                    return run_all(db, statements)
            except sqlite3.OperationalError as error:
                self._use_copy(error)
        with self._lock:
            if self._copy is None or self._return_to_file():
                with self._file() as db:
                    return run_all(db, statements)
            return self._copy.write(statements)

    def _use_copy(self, error: sqlite3.OperationalError) -> None:
        """Unavailable, or the error itself, where that would not help."""
        code = sqlite_code(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            message = f"{self._path} is locked by another process; try again when that has ended"
            raise Unavailable(message, retry_after_s=BUSY_TIMEOUT_S) from error
        if code not in UNWRITABLE:
            raise error
        with self._lock:
            if self._copy is None:
                self._copy = self._load(error)
                self._file_due_s = time.monotonic() + FILE_AGAIN_S
                log.info("weights_index_in_memory", path=str(self._path), why=str(error))

    def _load(self, error: sqlite3.OperationalError) -> IndexCopy:
        try:
            return IndexCopy(self._path, _SCHEMA)
        except (sqlite3.Error, OSError) as unread:
            message = f"the store's index, {self._path}, can be neither written ({error}) nor read ({unread})"
            raise NodeFault(message, retry_after_s=RETRY_AFTER_S) from unread

    def _return_to_file(self, *, now: bool = False) -> bool:
        """Write to the file what was written to the copy; False while that is not possible. Not tried all the time."""
        assert self._copy is not None
        if not now and time.monotonic() < self._file_due_s:
            return False
        self._file_due_s = time.monotonic() + FILE_AGAIN_S
        try:
            with self._file() as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(_SCHEMA)
                run_all(db, [statement for batch in self._copy.pending for statement in batch])
                # Needs the disk even where nothing is to be written.
                db.execute("PRAGMA user_version=0")
        except sqlite3.OperationalError:
            return False
        self._copy = None
        log.info("weights_index_on_disk", path=str(self._path))
        return True

    def save(self) -> bool:
        """Write what is only in memory to the file, now that there may be room; returns whether nothing is left."""
        with self._lock:
            return self._copy is None or self._return_to_file(now=True)

    def add(self, row: ObjectRow) -> None:
        values = (row.sha256, row.size_bytes, row.autov2, row.autov3, row.component, row.used_s, row.is_pinned)
        self._write(("INSERT OR REPLACE INTO objects VALUES (?,?,?,?,?,?,?)", [values]))

    def forget(self, sha256: str) -> list[tuple[str, str]]:
        """Drop the object and its rows; returns its links, as (view, link), which are now broken."""
        links, *_ = self._write(
            ("DELETE FROM links WHERE object=? RETURNING view, link", [(sha256,)]),
            ("DELETE FROM objects WHERE sha256=?", [(sha256,)]),
            ("DELETE FROM aliases WHERE object=?", [(sha256,)]),
            ("DELETE FROM tensors WHERE object=?", [(sha256,)]),
        )
        return [(str(view), str(link)) for view, link in links]

    def objects(self) -> list[ObjectRow]:
        """All objects, the least recently used first."""
        with self._reading() as db:
            rows = db.execute("SELECT * FROM objects ORDER BY used_s, sha256").fetchall()
        return [
            ObjectRow(sha256=a, size_bytes=b, autov2=c, autov3=d, component=e, used_s=f, is_pinned=bool(g))
            for a, b, c, d, e, f, g in rows
        ]

    def find(self, digest: str) -> str | None:
        """The object of a sha256, AutoV2 or AutoV3, with aliases resolved."""
        wanted = digest.lower()
        with self._reading() as db:
            row = (
                db.execute("SELECT object FROM aliases WHERE sha256=?", (wanted,)).fetchone()
                or db.execute(
                    "SELECT sha256 FROM objects WHERE sha256=? OR autov2=? OR autov3=?", (wanted, wanted, wanted)
                ).fetchone()
            )
        return str(row[0]) if row else None

    def find_component(self, key: str) -> str | None:
        with self._reading() as db:
            row = db.execute("SELECT sha256 FROM objects WHERE component=? LIMIT 1", (key,)).fetchone()
        return str(row[0]) if row else None

    def add_alias(self, sha256: str, target: str) -> None:
        self._write(("INSERT OR REPLACE INTO aliases VALUES (?,?)", [(sha256, target)]))

    def touch(self, shas: Iterable[str], now_s: float) -> None:
        self._write(("UPDATE objects SET used_s=? WHERE sha256=?", [(now_s, sha) for sha in shas]))

    def pin(self, shas: Iterable[str], is_pinned: bool) -> None:
        self._write(("UPDATE objects SET is_pinned=? WHERE sha256=?", [(is_pinned, sha) for sha in shas]))

    def add_table(self, file_sha256: str, held_in: str, table: TensorTable) -> None:
        """Record the tensors of an object, and the file's tensor table for later plans."""
        rows = [(t.sha256, held_in, t.begin, t.size_bytes) for t in table.tensors if t.sha256]
        text = json.dumps(table.to_json(), separators=(",", ":")) if file_sha256 else ""
        self._write(
            ("INSERT OR REPLACE INTO tables VALUES (?,?)", [(file_sha256, text)] if file_sha256 else []),
            ("INSERT OR REPLACE INTO tensors VALUES (?,?,?,?)", rows),
        )

    def table(self, file_sha256: str) -> TensorTable | None:
        with self._reading() as db:
            row = db.execute("SELECT table_json FROM tables WHERE sha256=?", (file_sha256,)).fetchone()
        return _read(row, TensorTable.from_json)

    def files_of(self, sha256: str) -> list[str]:
        """sha256 of the files that the object is, is an alias of, or is a part of."""
        with self._reading() as db:
            aliases = db.execute("SELECT sha256 FROM aliases WHERE object=?", (sha256,)).fetchall()
            origins = db.execute("SELECT file FROM origins WHERE object=?", (sha256,)).fetchall()
        return [sha256, *(str(row[0]) for row in [*aliases, *origins])]

    def add_origin(self, sha256: str, file_sha256: str) -> None:
        """Record which file the tensors of an object came from."""
        self._write(("INSERT OR IGNORE INTO origins VALUES (?,?)", [(sha256, file_sha256)]))

    def tensor_at(self, sha256: str, size_bytes: int) -> tuple[str, int] | None:
        """An object that contains the tensor, and the offset."""
        with self._reading() as db:
            row = db.execute(
                "SELECT object, begin FROM tensors WHERE sha256=? AND size_bytes=? LIMIT 1", (sha256, size_bytes)
            ).fetchone()
        return (str(row[0]), int(row[1])) if row else None

    def holdings(self) -> Holdings:
        with self._reading() as db:
            objects = {row[0] for row in db.execute("SELECT sha256 FROM objects UNION SELECT sha256 FROM aliases")}
            components = {row[0] for row in db.execute("SELECT component FROM objects WHERE component<>''")}
            tensors = {row[0] for row in db.execute("SELECT DISTINCT sha256 FROM tensors")}
        return Holdings(objects=frozenset(objects), components=frozenset(components), tensors=frozenset(tensors))

    def set_links(self, view: str, links: Iterable[tuple[str, str]]) -> None:
        self._write(("INSERT OR REPLACE INTO links VALUES (?,?,?)", [(view, link, sha) for link, sha in links]))

    def drop_view(self, view: str) -> None:
        self._write(("DELETE FROM links WHERE view=?", [(view,)]))

    def add_other_name(self, path: str, view: str, sha256: str) -> None:
        """Record another path of a model's object, where other programs expect it."""
        self._write(("INSERT OR REPLACE INTO other_names VALUES (?,?,?)", [(path, view, sha256)]))

    def drop_other_names(self, *, view: str = "", sha256: str = "") -> list[str]:
        """Drop the other paths of the view or the object; returns them."""
        (rows,) = self._write(("DELETE FROM other_names WHERE view=? OR object=? RETURNING path", [(view, sha256)]))
        return [str(row[0]) for row in rows]

    def links(self) -> list[tuple[str, str, str]]:
        """Every (view, link, object)."""
        with self._reading() as db:
            rows = db.execute("SELECT view, link, object FROM links ORDER BY view, link").fetchall()
        return [(str(a), str(b), str(c)) for a, b, c in rows]

    def remember_source(self, source: str, sha256: str, etag: str) -> None:
        self._write(("INSERT OR REPLACE INTO sources VALUES (?,?,?)", [(source, sha256, etag)]))

    def recall_source(self, source: str) -> tuple[str, str] | None:
        """sha256 and ETag of the last fetch from this source."""
        with self._reading() as db:
            row = db.execute("SELECT sha256, etag FROM sources WHERE source=?", (source,)).fetchone()
        return (str(row[0]), str(row[1])) if row else None

    def remember_manifest(self, reference: str, manifest: Manifest) -> None:
        self._write(
            ("INSERT OR REPLACE INTO manifests VALUES (?,?)", [(reference, manifest.to_text())]),
            ("INSERT OR REPLACE INTO names VALUES (?,?)", [(reference, manifest.view)]),
        )

    def names(self) -> list[tuple[str, str]]:
        """Every (reference, view) that was fetched."""
        with self._reading() as db:
            rows = db.execute("SELECT reference, view FROM names ORDER BY reference").fetchall()
        return [(str(a), str(b)) for a, b in rows]

    def recall_manifest(self, reference: str) -> Manifest | None:
        with self._reading() as db:
            row = db.execute("SELECT manifest_json FROM manifests WHERE reference=?", (reference,)).fetchone()
        return _read(row, manifest_from_json)

    def add_traffic(self, day: str, count: int) -> int:
        """Add bytes to the day; returns its total."""
        statement = "INSERT INTO traffic VALUES (?,?) ON CONFLICT (day) DO UPDATE SET bytes = bytes + excluded.bytes"
        ((row,),) = self._write((f"{statement} RETURNING bytes", [(day, count)]))
        return int(row[0])


def _read(row: tuple[Any, ...] | None, parse: Callable[[Any], Parsed]) -> Parsed | None:
    """What a row's JSON says; None for a damaged one too, which is written again when it is fetched again."""
    try:
        return parse(json.loads(row[0])) if row else None
    except (InvalidField, *MALFORMED) as error:
        log.warning("weights_index_row_unreadable", why=repr(error)[:200])
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """A view with all its files; `references`: those that it was fetched by."""

    name: str
    size_bytes: int
    is_pinned: bool
    used_s: float
    references: tuple[str, ...] = ()


def held_models(index: Index) -> list[HeldModel]:
    """Every view with all its files. Blocks for milliseconds."""
    rows = {row.sha256: row for row in index.objects()}
    views: dict[str, list[str]] = defaultdict(list)
    for view, _, sha in index.links():
        views[view].append(sha)
    names: dict[str, list[str]] = defaultdict(list)
    for reference, view in index.names():
        names[view].append(reference)
    return [
        HeldModel(
            name=view,
            size_bytes=sum(rows[sha].size_bytes for sha in set(shas)),
            is_pinned=all(rows[sha].is_pinned for sha in shas),
            used_s=max(rows[sha].used_s for sha in shas),
            references=tuple(names[view]),
        )
        for view, shas in views.items()
        if all(sha in rows for sha in shas)
    ]
