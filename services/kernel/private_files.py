"""Folders and files that no other user of the machine may read: 0700 and 0600, whatever the umask.

What was made by an earlier version, or put back from a backup, is tightened. Knows no service.
"""

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from services.kernel.logs import get_logger

log = get_logger()

FOLDER_MODE, FILE_MODE = 0o700, 0o600
UMASK = 0o077
_OTHERS = 0o077


def private(path: str, flags: int) -> int:
    """An `opener` for `open`: the file that it creates is for its owner alone."""
    return os.open(path, flags, FILE_MODE)


def make_private(folder: Path, names: Iterable[str]) -> None:
    """Create the folder if it does not exist; close it, and of what is in it the named files and trees, to others.

    A tree whose folder is closed already is not searched. OSError where the folder cannot be made.
    """
    folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    _close(folder)
    for name in names:
        close_tree(folder / name)


def close_tree(path: Path) -> None:
    """Close the file, or the folder with all that is in it, to others; nothing where it does not exist."""
    if _close(path) and path.is_dir() and not path.is_symlink():
        for each in path.rglob("*"):
            _close(each)


def _close(path: Path) -> bool:
    """Returns whether it was open to others. What belongs to another user is reported and left as it is."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        # A link has no mode of its own; a sticky folder, such as /tmp, is meant for all users.
        if stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX or not found.st_mode & _OTHERS:
            return False
        try:
            path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
        except OSError as error:
            log.warning("open_to_others", path=str(path), why=error.strerror, advice="let the gateway's user own it")
        return True
    return False
