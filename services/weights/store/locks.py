"""Locks among all processes of this machine: files that are locked until they are closed.

Where no lock file can be created, on a disk that is full or read-only, the file that it protects is locked itself.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path

POLL_S = 0.1

_NO_LOCK_FILE = (
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
)
# Errors of file systems that lock no file which is only read.
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.EROFS, errno.ENOTSUP, errno.EINVAL)


def try_lock(path: Path, *, is_shared: bool = False, otherwise: Path | None = None) -> int | None:
    """A file descriptor that holds the lock until it is closed; None if another process has it.

    `otherwise`: what is locked where the lock file does not exist and cannot be created. Without it nothing is, for
    locks of what cannot be written there anyway.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in _NO_LOCK_FILE:
            raise
        return _lock_unwritable((path, otherwise), is_shared=is_shared)
    return _flocked(fd, is_shared=is_shared)


def _flocked(fd: int, *, is_shared: bool) -> int | None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def _lock_unwritable(places: Iterable[Path | None], *, is_shared: bool) -> int | None:
    for place in places:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if place is not None:
                fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    return _flocked(fd, is_shared=is_shared)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.asynccontextmanager
async def locked(path: Path, on_wait: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
    """Hold the lock exclusively, among all processes of this machine. `on_wait` is called repeatedly while waiting."""
    while (fd := try_lock(path)) is None:
        if on_wait is not None:
            await on_wait()
        await asyncio.sleep(POLL_S)
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def shared(locks: Iterable[tuple[Path, Path]]) -> Iterator[bool]:
    """Hold all these locks, shared; yields False if another process has one of them exclusively.

    Each is a lock file and the file that it protects.
    """
    with contextlib.ExitStack() as stack:
        fds = []
        for path, protected in locks:
            fd = try_lock(path, is_shared=True, otherwise=protected)
            if fd is None:
                break
            stack.callback(os.close, fd)
            fds.append(fd)
        else:
            yield True
            return
        yield False
