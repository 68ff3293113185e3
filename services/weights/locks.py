"""File locks between processes; the system lets go of them when a process dies in any way."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path

POLL_S = 0.1


def try_lock(path: Path, *, is_shared: bool = False) -> int | None:
    """A descriptor that holds the lock until it is closed, or None when somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@contextlib.asynccontextmanager
async def locked(path: Path, look: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
    """Alone with the file, among all processes of this machine. `look` is called now and then while another has it."""
    while (fd := try_lock(path)) is None:
        if look is not None:
            await look()
        await asyncio.sleep(POLL_S)
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def shared(paths: Iterable[Path]) -> Iterator[bool]:
    """Holds all of them, together with whoever else does; False when somebody has one alone."""
    with contextlib.ExitStack() as stack:
        fds = []
        for path in paths:
            fd = try_lock(path, is_shared=True)
            if fd is None:
                break
            stack.callback(os.close, fd)
            fds.append(fd)
        else:
            yield True
            return
        yield False
