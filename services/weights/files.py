"""Reading files once: their tensors, their digests, and what a full disk is called. Blocking."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from services.weights.errors import DiskFull
from services.weights.manifest import TensorTable
from services.weights.tensors import LENGTH_BYTES, header_length, parse_header, with_digests

READ_BYTES = 4 * 1024 * 1024


def read_table(path: Path) -> TensorTable:
    """The tensors of a safetensors file, checked against its size; BadHeader."""
    with path.open("rb") as file:
        first = file.read(LENGTH_BYTES)
        header = file.read(header_length(first))
    return parse_header(first, header, size_bytes=path.stat().st_size)


def digest_tensors(path: Path, table: TensorTable) -> TensorTable:
    """The table with each tensor's sha256, by reading the file once."""
    digests = {}
    with path.open("rb") as file:
        for tensor in table.tensors:
            file.seek(tensor.begin)
            digests[tensor.name] = _digest(file.read, tensor.size_bytes)
    return with_digests(table, digests)


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


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Tell a full disk apart from a broken one."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full while fetching {what}") from error
        raise
