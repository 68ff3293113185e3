"""A download on disk: `KEY.part` holds its bytes, `KEY.map` says which of them are there. Blocking.

The map is a journal: a line that says what is downloaded, then fixed records, each with a checksum, appended after
the bytes they speak of. A process killed at any moment leaves both files usable; a torn last record is ignored.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import sqlite3
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fanlight.errors import NodeFault
from services.weights.errors import DiskFull
from services.weights.references.manifest import ByteSpan, merge
from services.weights.references.tensors import READ_BYTES

MIN_PIECE_BYTES = 256 * 1024
PIECE_S = 4.0
SYNC_FILE_RANGE_WRITE = 2
_RECORD = struct.Struct("<BQQI")
RECORD_BYTES = _RECORD.size
_ADD, _DROP = 1, 2


@dataclass(slots=True)
class ChunkMap:
    """Bytes 0 to `size` as done, in flight, or missing. `done` are disjoint, sorted spans that never touch."""

    size: int
    done: list[ByteSpan] = field(default_factory=list)
    flights: list[ByteSpan] = field(default_factory=list)

    @property
    def done_bytes(self) -> int:
        return sum(map(len, self.done))

    @property
    def unasked_bytes(self) -> int:
        """What is neither done nor in flight."""
        return sum(map(len, self.missing()))

    @property
    def is_complete(self) -> bool:
        return self.done_bytes == self.size

    @property
    def frontier(self) -> int:
        """The first byte that is not here."""
        return self.done[0].end if self.done and self.done[0].begin == 0 else 0

    def add(self, begin: int, end: int) -> None:
        """Count these bytes as done; once more does no harm."""
        if not 0 <= begin <= end <= self.size:
            raise ValueError(f"{begin}..{end} is not within {self.size}")
        if begin == end:
            return
        first = bisect_right(self.done, begin, key=lambda s: s.end)
        if first and self.done[first - 1].end == begin:
            first -= 1
        last = first
        while last < len(self.done) and self.done[last].begin <= end:
            begin, end = min(begin, self.done[last].begin), max(end, self.done[last].end)
            last += 1
        self.done[first:last] = [ByteSpan(begin, end)]

    def drop(self, begin: int, end: int) -> None:
        """Count these bytes as missing: they were wrong."""
        if begin >= end:
            return
        kept: list[ByteSpan] = []
        for span in self.done:
            kept.append(ByteSpan(span.begin, min(span.end, begin)))
            kept.append(ByteSpan(max(span.begin, end), span.end))
        self.done = [span for span in kept if span.begin < span.end]

    def missing(self) -> Iterator[ByteSpan]:
        """What is neither done nor in flight, from the front."""
        yield from gaps(merge([*self.done, *self.flights]), self.size)

    def take(self, wanted_bytes: int, borders: Iterable[int] = ()) -> ByteSpan | None:
        """The next piece to fetch, now in flight; None when there is none. It crosses none of the borders."""
        span = next(self.missing(), None)
        if span is None:
            return None
        end = min([span.end, span.begin + max(1, wanted_bytes), *(b for b in borders if b > span.begin)])
        piece = ByteSpan(span.begin, end)
        self.flights.append(piece)
        return piece

    def land(self, piece: ByteSpan) -> None:
        """The piece is no longer in flight; what of it was done has been added, the rest is missing again."""
        self.flights.remove(piece)


def gaps(spans: Iterable[ByteSpan], size: int) -> Iterator[ByteSpan]:
    """What of 0 to `size` the sorted spans leave out."""
    at = 0
    for span in spans:
        if span.begin > at:
            yield ByteSpan(at, span.begin)
        at = max(at, span.end)
    if at < size:
        yield ByteSpan(at, size)


def piece_bytes(*, left: int, connections: int, bytes_per_s: float, largest: int) -> int:
    """How much one request asks for, of `left` bytes that nobody has asked for.

    What a connection gets in PIECE_S; the less is left the smaller, so that all connections end together.
    """
    by_rate = int(PIECE_S * bytes_per_s / connections)
    return max(MIN_PIECE_BYTES, min(largest, by_rate, left // (2 * connections)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSegment:
    """Bytes `begin` to `end` of the source, which lie at `at` in the download."""

    at: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the bytes of a download lie in its source: one segment for a whole file, several for single tensors."""

    segments: tuple[FileSegment, ...]

    @property
    def size(self) -> int:
        return sum(s.end - s.begin for s in self.segments)

    @property
    def borders(self) -> tuple[int, ...]:
        return tuple(s.at for s in self.segments[1:])

    def to_source(self, offset: int) -> int:
        """Where in the source the byte at `offset` of the download lies."""
        index = bisect_right(self.segments, offset, key=lambda s: s.at) - 1
        segment = self.segments[index]
        return segment.begin + offset - segment.at

    def to_download(self, begin: int) -> int:
        """Where in the download the source's byte `begin` lies."""
        segment = next(s for s in self.segments if s.begin <= begin < s.end or s.begin == begin)
        return segment.at + begin - segment.begin


def whole(size: int) -> Layout:
    return Layout(segments=(FileSegment(at=0, begin=0, end=size),))


def of_spans(spans: Iterable[ByteSpan]) -> Layout:
    """The layout for these parts of a source, neighbours joined."""
    segments, at = [], 0
    for span in merge(spans):
        segments.append(FileSegment(at=at, begin=span.begin, end=span.end))
        at += len(span)
    return Layout(segments=tuple(segments))


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


def journal_of(folder: Path, key: str) -> Path:
    return folder / f"{key}.map"


def replay(map_: ChunkMap, record: bytes) -> bool:
    """Do to the map what the record says; False for one that is torn or wrong."""
    kind, begin, end, checksum = _RECORD.unpack(record)
    if checksum != zlib.crc32(record[:-4]) or not 0 <= begin <= end <= map_.size:
        return False
    (map_.add if kind == _ADD else map_.drop)(begin, end)
    return True


class Partial:
    def __init__(self, folder: Path, key: str, *, size: int, identity: str) -> None:
        self.path = folder / f"{key}.part"
        self._journal_path = journal_of(folder, key)
        self._head = (json.dumps({"size": size, "identity": identity}) + "\n").encode()
        self.map = ChunkMap(size)
        self.resumed_bytes = 0
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._load()
            self._allocate(size)
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        data = self._journal_path.read_bytes()
        if not data.startswith(self._head) or os.fstat(self._fd).st_size != self.map.size:
            self.restart()
            return
        end = len(self._head)
        for at in range(end, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
            if not replay(self.map, data[at : at + RECORD_BYTES]):
                break
            end = at + RECORD_BYTES
        os.ftruncate(self._journal, end)
        self.resumed_bytes = self.map.done_bytes

    def _allocate(self, size: int) -> None:
        """Take the room now: a disk that fills up says so before the download, not in its middle."""
        if not size:
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._fd, size)

    def restart(self) -> None:
        """Forget all bytes."""
        os.ftruncate(self._journal, 0)
        os.write(self._journal, self._head)
        self.map.done = []
        self.resumed_bytes = 0

    def write(self, begin: int, data: bytes) -> None:
        at = begin
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, at)
            view, at = view[count:], at + count
        self._record(_ADD, begin, at)

    def note(self, begin: int, end: int) -> None:
        """The event loop's side of `write`: the map is changed by one thread only."""
        self.map.add(begin, end)

    def drop(self, span: ByteSpan) -> None:
        self._record(_DROP, span.begin, span.end)
        self.map.drop(span.begin, span.end)

    def _record(self, kind: int, begin: int, end: int) -> None:
        body = _RECORD.pack(kind, begin, end, 0)[:-4]
        os.write(self._journal, body + zlib.crc32(body).to_bytes(4, "little"))

    def digest(self, span: ByteSpan) -> str:
        digest = hashlib.sha256()
        self.feed(digest.update, span)
        return digest.hexdigest()

    def feed(self, take: Callable[[bytes], object], span: ByteSpan) -> None:
        """Give the bytes of the span to `take`, block by block."""
        at = span.begin
        while at < span.end:
            block = os.pread(self._fd, min(READ_BYTES, span.end - at), at)
            if not block:
                break
            take(block)
            at += len(block)

    def begin_writing(self, span: ByteSpan) -> None:
        """Let the disk take these bytes now, so that making them durable at the end takes no time."""
        if span.begin < span.end:
            begin_writing(self._fd, span.begin, len(span))

    def read(self, begin: int, count: int) -> bytes:
        return os.pread(self._fd, count, begin)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._journal)

    def forget(self) -> None:
        """Remove the map; the part has been published, or is of no use."""
        self._journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        self.forget()
        self.path.unlink(missing_ok=True)
