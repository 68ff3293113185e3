"""Notices that a SQLite file is no longer what was opened, and says in one sentence why a file cannot be used.

Knows no table and no statement.
"""

import os
import sqlite3
from pathlib import Path

# Of the file's header: what marks it as SQLite, and what a running gateway never changes: page size and format, then
# the version of the schema and the process's own number. The counters between them change with every checkpoint.
_HEADER_BYTES = 100
_MAGIC = slice(0, 24)
_OWN_NUMBER = slice(56, 72)
# Errors of a file whose content is not what it was.
SPOILED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# What to do after each fault of the file.
ADVICE = "stop the gateway, put the file back from a backup or move what is left of it away, and start again"


class FileLost(Exception):
    """The open file is no longer the one at its path, or no longer what it was. One sentence says what to do."""


class FileGuard:
    """Notices that an open database is not at its path any more: what is written then would be lost.

    Compares inode and size of the file and of its log (`-wal`), and the file's header whenever the file has changed:
    two calls of the system while it has not.
    """

    def __init__(self, path: Path) -> None:
        """Right after the file was opened and its header written."""
        # A file system without write-ahead logs has no log.
        self._paths = [each for each in (path, path.with_name(f"{path.name}-wal")) if each.exists()]
        self._seen = [os.stat(each) for each in self._paths]
        # Never closed before the connection: closing it would drop SQLite's own locks of the file.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._header = self._read_header()
        self._header_is_wrong = False

    def _read_header(self) -> tuple[bytes, bytes]:
        header = os.pread(self._fd, _HEADER_BYTES, 0)
        return header[_MAGIC], header[_OWN_NUMBER]

    def check(self) -> None:
        """FileLost. Neither file ever shrinks while it is open."""
        changed_ns = self._seen[0].st_mtime_ns
        for i, path in enumerate(self._paths):
            before = self._seen[i]
            try:
                now = os.stat(path)
            except FileNotFoundError as error:
                raise FileLost(f"{path} was deleted while the gateway uses it; {ADVICE}") from error
            except OSError as error:
                raise FileLost(f"{path} cannot be looked at: {error.strerror}; {ADVICE}") from error
            if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
                raise FileLost(f"{path} was replaced while the gateway uses it; {ADVICE}")
            if now.st_size < before.st_size:
                raise FileLost(f"{path} was truncated while the gateway uses it; {ADVICE}")
            self._seen[i] = now
        if self._seen[0].st_mtime_ns != changed_ns and self._read_header() != self._header:
            self._header_is_wrong = True
        if self._header_is_wrong:
            raise FileLost(f"{self._paths[0]} was overwritten while the gateway uses it; {ADVICE}")

    def close(self) -> None:
        os.close(self._fd)


def code_of(error: sqlite3.Error) -> int:
    """The primary code; 0 for an error that is not SQLite's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def why_not(path: Path, error: sqlite3.Error | OSError) -> str:
    if isinstance(error, OSError):
        return f"{path} cannot be opened: {error.strerror}; is the data folder writable (FANLIGHT_GATEWAY_DATA_DIR)?"
    code = code_of(error)
    if code == sqlite3.SQLITE_BUSY:
        return f"{path} is in use: it serves one gateway at a time"
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return f"{path} cannot be opened: {error}; is the data folder writable (FANLIGHT_GATEWAY_DATA_DIR)?"
    if code == sqlite3.SQLITE_IOERR:
        return f"{path} cannot be opened: {error}; is its disk read-only, or does it fail?"
    if code == sqlite3.SQLITE_FULL:
        return f"{path} cannot be opened: {error}; make room on the disk of the data folder"
    return f"{path} cannot be opened: {error}; put it back from a backup, or move it away (mv {path} {path}.old)"
