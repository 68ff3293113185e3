"""A download on disk: `KEY.part` holds its bytes, `KEY.map` says which of them are there. Blocking.

The map is a journal: a line that says what is downloaded, then fixed records, each with a checksum, appended after
the bytes they speak of. A process killed at any moment leaves both files usable; a torn last record is ignored.
"""

import errno
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from services.weights.chunks import ChunkMap, Span
from services.weights.files import READ_BYTES, begin_writing

_RECORD = struct.Struct("<BQQI")
RECORD_BYTES = _RECORD.size
_ADD, _DROP = 1, 2


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

    def drop(self, span: Span) -> None:
        self._record(_DROP, span.begin, span.end)
        self.map.drop(span.begin, span.end)

    def _record(self, kind: int, begin: int, end: int) -> None:
        body = _RECORD.pack(kind, begin, end, 0)[:-4]
        os.write(self._journal, body + zlib.crc32(body).to_bytes(4, "little"))

    def digest(self, span: Span) -> str:
        digest = hashlib.sha256()
        self.feed(digest.update, span)
        return digest.hexdigest()

    def feed(self, take: Callable[[bytes], object], span: Span) -> None:
        """Give the bytes of the span to `take`, block by block."""
        at = span.begin
        while at < span.end:
            block = os.pread(self._fd, min(READ_BYTES, span.end - at), at)
            if not block:
                break
            take(block)
            at += len(block)

    def begin_writing(self, span: Span) -> None:
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
