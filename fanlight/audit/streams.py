"""Streams of layers: hashed as they are read, unpacked from gzip, zstd, xz or bzip2. Nothing is kept."""

import bz2
import gzip
import hashlib
import io
import lzma
import shutil
import subprocess
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from .model import AuditError

CHUNK = 1 << 20
GZIP_MAGIC, ZSTD_MAGIC, XZ_MAGIC, BZIP2_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh"
# Frames that zstd skips may come first: the format allows it, and chunked layers have them.
SKIPPABLE_MAGIC = tuple(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))
# As many bytes as the longest of these.
HEAD_BYTES = 6
# At this level zlib makes of a layer what the gzip of skopeo, podman and docker makes of it, within a hundredth.
GZIP_LEVEL = 3
ALGORITHMS = ("sha256", "sha512")
# The widest window that zstd can pack with.
ZSTD = ("zstd", "-dc", "--long=31")


def hash_of(digest: str) -> str:
    """The name of the function that made a digest such as sha256:..."""
    name, _, hexadecimal = digest.partition(":")
    if name not in ALGORITHMS or not hexadecimal:
        raise AuditError(f"{digest!r} is no digest of a kind that is known: {', '.join(ALGORITHMS)}")
    return name


class Hashed(io.RawIOBase):
    """Counts and hashes what is read through it."""

    def __init__(self, source: BinaryIO, algorithm: str = "sha256", *, estimate: bool = False) -> None:
        self._source = source
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm)
        # Where the last byte ends that is not 0.
        self.content_bytes = 0
        self._gzip = zlib.compressobj(GZIP_LEVEL, wbits=31) if estimate else None
        self._gzip_bytes = 0
        self.size_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self._hash.update(data)
        if content := len(data.rstrip(b"\0")):
            self.content_bytes = self.size_bytes + content
        self.size_bytes += len(data)
        if self._gzip:
            self._gzip_bytes += len(self._gzip.compress(data))
        return len(data)

    def drain(self) -> None:
        while self.read(CHUNK):
            pass

    @property
    def digest(self) -> str:
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def gzip_bytes(self) -> int:
        """What gzip makes of it; ask once, at the end."""
        assert self._gzip
        return self._gzip_bytes + len(self._gzip.flush())


def is_packed(head: bytes) -> bool:
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC, *SKIPPABLE_MAGIC, XZ_MAGIC, BZIP2_MAGIC))


@contextmanager
def unpacked(source: BinaryIO, head: bytes, what: str) -> Iterator[BinaryIO]:
    """The stream inside: what packed it is recognized by the first bytes, anything else is taken as it is."""
    joined = io.BufferedReader(cast(io.RawIOBase, _Joined(head, source)), CHUNK)
    if head.startswith(GZIP_MAGIC):
        yield cast(BinaryIO, gzip.GzipFile(fileobj=joined))
    elif head.startswith(XZ_MAGIC):
        with lzma.LZMAFile(joined) as inside:
            yield cast(BinaryIO, inside)
    elif head.startswith(BZIP2_MAGIC):
        with bz2.BZ2File(joined) as inside:
            yield cast(BinaryIO, inside)
    elif head.startswith((ZSTD_MAGIC, *SKIPPABLE_MAGIC)):
        with _zstd(joined, what) as unpacking:
            yield unpacking
    else:
        yield joined


class _Joined(io.RawIOBase):
    """First the bytes that were read already, then the rest."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :] if self._head else b""
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _zstd(source: BinaryIO, what: str) -> Iterator[BinaryIO]:
    """Through the `zstd` program: Python has it only from 3.14 on."""
    if shutil.which(ZSTD[0]) is None:
        raise AuditError(f"{what} is packed with zstd: install the zstd program to read it")
    with subprocess.Popen(ZSTD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdin
        assert run.stdout
        feeder = threading.Thread(target=_feed, args=(source, run.stdin), daemon=True)
        feeder.start()
        yield run.stdout  # type: ignore[misc]
        while run.stdout.read(CHUNK):
            pass
        feeder.join()
        if run.wait():
            raise AuditError(f"{what} is damaged or cut short: zstd cannot unpack it")


def _feed(source: BinaryIO, sink: BinaryIO) -> None:
    try:
        shutil.copyfileobj(source, sink, CHUNK)
        sink.close()
    except OSError:
        # zstd gave up; its exit code says so.
        while source.read(CHUNK):
            pass
