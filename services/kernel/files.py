"""Reading files that strangers may have put there: only ordinary ones, and no more bytes than expected."""

import os
import stat
from pathlib import Path
from typing import BinaryIO


class StrangeFile(ValueError):
    """No ordinary file, or one that is larger than any of its kind."""


def open_ordinary(path: Path) -> BinaryIO:
    """The file, opened to read. StrangeFile for a pipe, device or the like, of which opening or reading could wait.

    OSError where it cannot be opened.
    """
    # Closed by the caller, or below.
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise StrangeFile(f"{path.name} is no ordinary file")
    return file


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """All bytes of an ordinary file. StrangeFile for one that is larger than the limit, OSError."""
    with open_ordinary(path) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise StrangeFile(f"{path.name} has more than {limit_bytes} bytes")
    return data


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for its writer; an ordinary file is not read in another way for it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
