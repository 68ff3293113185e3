"""A resumable download on disk: `KEY.part` has its bytes, `KEY.map` is the journal of which bytes are there. Blocking.

The journal is one header line, then fixed-size records with checksums, each appended after the bytes that it is about.
A process killed at any moment leaves both files usable for resume; a torn last record is ignored. Knows no network.
"""

import ctypes
import errno
import hashlib
import json
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

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
    """Which bytes of 0 to `size` are done, in flight or missing. `done`: sorted, disjoint spans that never touch."""

    size: int
    done: list[ByteSpan] = field(default_factory=list)
    flights: list[ByteSpan] = field(default_factory=list)

    @property
    def done_bytes(self) -> int:
        return sum(map(len, self.done))

    @property
    def unrequested_bytes(self) -> int:
        """Bytes neither done nor in flight."""
        return sum(map(len, self.missing()))

    @property
    def is_complete(self) -> bool:
        return self.done_bytes == self.size

    @property
    def frontier(self) -> int:
        """The offset of the first byte that is not done."""
        return self.done[0].end if self.done and self.done[0].begin == 0 else 0

    def add(self, begin: int, end: int) -> None:
        """Mark these bytes as done; idempotent."""
        if not 0 <= begin <= end <= self.size:
            raise ValueError(f"{begin}..{end} is outside 0..{self.size}")
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
        """Mark these bytes as missing: they were wrong."""
        if begin >= end:
            return
        kept: list[ByteSpan] = []
        for span in self.done:
            kept.append(ByteSpan(span.begin, min(span.end, begin)))
            kept.append(ByteSpan(max(span.begin, end), span.end))
        self.done = [span for span in kept if span.begin < span.end]

    def missing(self) -> Iterator[ByteSpan]:
        """Spans neither done nor in flight, in order."""
        yield from gaps(merge([*self.done, *self.flights]), self.size)

    def take(self, wanted_bytes: int, borders: Iterable[int] = ()) -> ByteSpan | None:
        """Take the next piece to fetch and mark it in flight; None if nothing is missing. It crosses no border."""
        span = next(self.missing(), None)
        if span is None:
            return None
        end = min([span.end, span.begin + max(1, wanted_bytes), *(b for b in borders if b > span.begin)])
        piece = ByteSpan(span.begin, end)
        self.flights.append(piece)
        return piece

    def release(self, piece: ByteSpan) -> None:
        """The piece is no longer in flight; bytes of it that were not added are missing again."""
        self.flights.remove(piece)


def gaps(spans: Iterable[ByteSpan], size: int) -> Iterator[ByteSpan]:
    """The spans of 0 to `size` that the sorted spans do not cover."""
    at = 0
    for span in spans:
        if span.begin > at:
            yield ByteSpan(at, span.begin)
        at = max(at, span.end)
    if at < size:
        yield ByteSpan(at, size)


def piece_bytes(*, left: int, connections: int, bytes_per_s: float, largest: int) -> int:
    """Bytes to request at once, of `left` bytes that are not requested yet.

    What one connection receives in PIECE_S; smaller towards the end, so that all connections finish together.
    """
    by_rate = int(PIECE_S * bytes_per_s / connections)
    return max(MIN_PIECE_BYTES, min(largest, by_rate, left // (2 * connections)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSegment:
    """Bytes `begin` to `end` of the source file, at offset `at` of the download."""

    at: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a download's bytes are in its source file: one segment for a whole file, several for single tensors."""

    segments: tuple[FileSegment, ...]

    @property
    def size(self) -> int:
        return sum(s.end - s.begin for s in self.segments)

    @property
    def borders(self) -> tuple[int, ...]:
        return tuple(s.at for s in self.segments[1:])

    def to_source(self, offset: int) -> int:
        """The source offset of the byte at `offset` of the download."""
        index = bisect_right(self.segments, offset, key=lambda s: s.at) - 1
        segment = self.segments[index]
        return segment.begin + offset - segment.at

    def to_download(self, begin: int) -> int:
        """The download offset of the source's byte `begin`."""
        segment = next(s for s in self.segments if s.begin <= begin < s.end or s.begin == begin)
        return segment.at + begin - segment.begin


def whole_file_layout(size: int) -> Layout:
    return Layout(segments=(FileSegment(at=0, begin=0, end=size),))


def layout_of_spans(spans: Iterable[ByteSpan]) -> Layout:
    """The layout for these spans of a source, adjacent spans joined."""
    segments, at = [], 0
    for span in merge(spans):
        segments.append(FileSegment(at=at, begin=span.begin, end=span.end))
        at += len(span)
    return Layout(segments=tuple(segments))


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """The Linux system call; None on other systems."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


def begin_writing(fd: int, offset: int, count: int) -> None:
    """Start writing the bytes to the disk; does not wait and guarantees nothing."""
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, count, SYNC_FILE_RANGE_WRITE)


def journal_of(folder: Path, key: str) -> Path:
    return folder / f"{key}.map"


def replay(map_: ChunkMap, record: bytes) -> bool:
    """Apply a journal record to the map; False if the record is torn or invalid."""
    kind, begin, end, checksum = _RECORD.unpack(record)
    if checksum != zlib.crc32(record[:-4]) or not 0 <= begin <= end <= map_.size:
        return False
    (map_.add if kind == _ADD else map_.drop)(begin, end)
    return True


class PartialFile:
    """The part file and journal of one download. `identity`: bytes are resumed only if it is the same as before.

    `size` is None for a file of unknown length, which arrives in order and is written to a part of its own.
    """

    def __init__(self, folder: Path, key: str, *, size: int | None, identity: str) -> None:
        self.is_growing, size = size is None, size or 0
        self.path = folder / f"{key}.{'stream' if self.is_growing else 'part'}"
        self._journal_path = folder / f"{key}.stream-map" if self.is_growing else journal_of(folder, key)
        self._head = (json.dumps({"size": size, "identity": identity}) + "\n").encode()
        self.map = ChunkMap(size)
        self.resumed_bytes = 0
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._load()
            self._allocate(self.map.size)
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        data = self._journal_path.read_bytes()
        if self.is_growing:
            self.map.size = os.fstat(self._fd).st_size
        if not data.startswith(self._head) or os.fstat(self._fd).st_size != self.map.size:
            self.restart()
            return
        end = len(self._head)
        for at in range(end, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
            if not replay(self.map, data[at : at + RECORD_BYTES]):
                break
            end = at + RECORD_BYTES
        os.ftruncate(self._journal, end)
        if self.is_growing:
            self.map.size = self.map.frontier
        self.resumed_bytes = self.map.done_bytes

    def _allocate(self, size: int) -> None:
        """Allocate the space now: a full disk fails before the download, not in the middle."""
        if os.fstat(self._fd).st_size > size:
            os.ftruncate(self._fd, size)
        if not size:
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._fd, size)

    def restart(self) -> None:
        """Discard all bytes."""
        os.ftruncate(self._journal, 0)
        os.write(self._journal, self._head)
        self.map.done = []
        self.resumed_bytes = 0
        if self.is_growing:
            self.map.size = 0
            os.ftruncate(self._fd, 0)

    def grow(self, size: int) -> None:
        """A file of unknown length has at least so many bytes."""
        self.map.size = max(self.map.size, size)

    def write(self, begin: int, data: bytes) -> None:
        at = begin
        view = memoryview(data)
        while view:
            count = os.pwrite(self._fd, view, at)
            view, at = view[count:], at + count
        self._record(_ADD, begin, at)

    def note(self, begin: int, end: int) -> None:
        """Mark written bytes as done. On the event loop: only one thread changes the map."""
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
        """Pass the bytes of the span to `take`, block by block."""
        at = span.begin
        while at < span.end:
            block = os.pread(self._fd, min(READ_BYTES, span.end - at), at)
            if not block:
                break
            take(block)
            at += len(block)

    def begin_writing(self, span: ByteSpan) -> None:
        """Start writing these bytes to disk now, so that the final fsync is quick."""
        if span.begin < span.end:
            begin_writing(self._fd, span.begin, len(span))

    def read(self, begin: int, count: int) -> bytes:
        return os.pread(self._fd, count, begin)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._journal)

    def forget(self) -> None:
        """Remove the journal; the part was published or is useless."""
        self._journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        self.forget()
        self.path.unlink(missing_ok=True)
