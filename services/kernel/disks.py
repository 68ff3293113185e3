"""What a disk refuses, in words: it is full, read-only or failing, or too many files are open.

Knows no service and no store: who catches the error says what was to be written, and when to try again.
"""

import errno
import os
import sqlite3
import tempfile
from pathlib import Path

from fanlight.errors import Unavailable
from services.kernel.logs import get_logger

log = get_logger()

# When room may have been made, or a disk mounted again.
RETRY_AFTER_S = 60.0

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk fails (input/output error)",
    errno.EMFILE: "this process has too many files open (ulimit -n)",
    errno.ENFILE: "the machine has too many files open",
    errno.ESTALE: "the disk was unmounted or its server restarted (stale handle)",
    errno.ENOMEM: "the machine has no memory left",
}
# Of SQLite: its file, or one that it needs beside it, cannot be read or written.
UNWRITABLE = (
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
)


def is_of_disk(error: OSError) -> bool:
    """Whether the machine is at fault: no caller's input, and no mistake of ours, leads to such an error."""
    return error.errno in _WHY


def is_no_room(error: OSError) -> bool:
    return error.errno in NO_ROOM


def why(error: OSError) -> str:
    """Such as `the disk is full`; the system's words where we have none."""
    return _WHY.get(error.errno or 0) or error.strerror or str(error) or os.strerror(errno.EIO)


def folder_of(error: OSError, otherwise: Path | str) -> str:
    """The folder of the file that the error names; `otherwise` where it names none, as errors of writes do not."""
    name = error.filename
    return os.path.dirname(name) or name if isinstance(name, str) and name else str(otherwise)


def unavailable(error: OSError) -> Unavailable:
    """For callers: what failed is this machine's, and may pass. An operator must know of it."""
    where = folder_of(error, "")
    log.error("disk_fault", folder=where, why=why(error))
    return Unavailable(f"{why(error)}{f' in {where}' if where else ''}", retry_after_s=RETRY_AFTER_S)


def no_temporary_file(error: OSError) -> Unavailable:
    """For callers: what they send cannot be buffered."""
    # Known without another look at the disk, unless no folder could be written at all.
    place = tempfile.tempdir or "the folder for temporary files"
    log.error("temporary_file_failed", folder=place, why=why(error))
    message = f"no temporary file can be written in {place} (TMPDIR): {why(error)}"
    return Unavailable(message, retry_after_s=RETRY_AFTER_S)


def sqlite_code(error: sqlite3.Error) -> int:
    """The primary code; 0 for an error that is not SQLite's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
