"""Reading files once: their tensors, their digests, and what a full disk is called. Blocking."""

import contextlib
import ctypes
import errno
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from fanlight.errors import NodeFault
from services.weights.errors import DiskFull
from services.weights.manifest import TensorTable
from services.weights.tensors import LENGTH_BYTES, header_length, parse_header

READ_BYTES = 4 * 1024 * 1024
SYNC_FILE_RANGE_WRITE = 2


def read_table(path: Path) -> TensorTable:
    """The tensors of a safetensors file, checked against its size; BadHeader."""
    with path.open("rb") as file:
        first = file.read(LENGTH_BYTES)
        header = file.read(header_length(first))
    return parse_header(first, header, size_bytes=path.stat().st_size)


def sha256_of(path: Path) -> str:
    return sha256_from(path, 0)


def sha256_from(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return _digest(file.read, path.stat().st_size - begin)


def _digest(read: Callable[[int], bytes], count: int) -> str:
    digest = hashlib.sha256()
    while count and (block := read(min(READ_BYTES, count))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


def bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """Linux's; None elsewhere."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


def begin_writing(fd: int, offset: int, count: int) -> None:
    """Ask the system to write the bytes to the disk from now on; waits for nothing, promises nothing."""
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, count, SYNC_FILE_RANGE_WRITE)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Tell a full disk apart from a broken one, and say for what it was too full."""
    try:
        yield
    except DiskFull as error:
        raise DiskFull(f"{what}: {error.message}", retry_after_s=error.retry_after_s) from error
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise DiskFull(f"the disk is full while fetching {what}") from error
        raise NodeFault(f"{what}: the store's index cannot be written ({error}); is the disk full?") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full while fetching {what}") from error
        raise
