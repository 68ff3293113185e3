"""One `fanlight up` for a data folder. The lock is also in its children's hands, and ends with the last of them."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fanlight.errors import FanlightError, InvalidInput

# How long children of an `up` that was killed may take to end.
WAIT_S = 30.0
TRY_EVERY_S = 0.2


class DataInUse(FanlightError):
    code = "FAILED_PRECONDITION"


@contextlib.contextmanager
def locked(
    folder: Path, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[int]:
    """A file descriptor that holds the folder, and goes on doing so in every process it is passed to.

    DataInUse while another `up` lives; where only its children are left, they are waited for.
    """
    descriptor = _open(folder)
    try:
        until_s = clock() + WAIT_S
        while not _try(descriptor):
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            if _lives(owner) or clock() >= until_s:
                raise DataInUse(
                    f"{folder} is in use by another `fanlight up` (process {owner}): name another with --data"
                )
            sleep(TRY_EVERY_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be used for data: {error.strerror}") from error


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lives(owner: str) -> bool:
    """Whether the process is there. Its number may be somebody else's by now; then the error names it."""
    if not owner.isdigit():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
