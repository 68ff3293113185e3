"""Blobs as files of one folder, in blocking calls that any thread may make. Knows no event loop."""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from services.kernel.blobs import BlobInfo, Keep
from services.kernel.digests import named, parse_digest, parse_scope
from services.kernel.errors import Cancelled, FanlightError, InvalidField, NodeFault, ResourceExhausted, TooLarge
from services.kernel.media import media_type_of

# No scope can have this name.
INCOMING = ".incoming"
FULL_RETRY_AFTER_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HEAD_BYTES = 16


class BlobFiles:
    """`{root}/{scope}/ab/cdef...`; what is being written lies in `{root}/.incoming` until it is whole."""

    def __init__(self, root: Path, *, budget_bytes: int, blob_limit_bytes: int) -> None:
        """Makes the folder, removes what an earlier process left unfinished, and counts what is there."""
        self._root = root
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self.blob_limit_bytes = blob_limit_bytes
        (root / INCOMING).mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._used_bytes = sum(path.stat().st_size for _, _, path in self._all())

    @property
    def used_bytes(self) -> int:
        """Bytes of the blobs, and of those being written."""
        return self._used_bytes

    def path(self, scope: str, digest: str) -> Path:
        """Where the blob lies if it is kept. InvalidField for names that could lead out of the folder."""
        name = parse_digest(digest, field="digest").removeprefix("sha256:")
        return self._root / parse_scope(scope, field="scope") / name[:2] / name[2:]

    def stat(self, scope: str, digest: str) -> BlobInfo | None:
        """Marks it as used: its time of change is the time of its last use."""
        try:
            with self._lock, self.path(scope, digest).open("rb") as file:
                os.utime(file.fileno())
                return BlobInfo(
                    scope=scope,
                    digest=digest,
                    size_bytes=os.fstat(file.fileno()).st_size,
                    media_type=media_type_of(file.read(_HEAD_BYTES)),
                )
        except FileNotFoundError:
            return None

    def delete(self, scope: str, digest: str) -> None:
        with self._lock:
            self._remove(self.path(scope, digest))

    def sweep(self, *, before_s: float, keep: Keep) -> int:
        """Delete what was last used before that time; how many there were."""
        swept = 0
        for scope, digest, path in self._all():
            needed = keep(scope, digest)
            with self._lock, contextlib.suppress(FileNotFoundError):
                if needed:
                    os.utime(path)
                elif path.stat().st_mtime < before_s:
                    self._remove(path)
                    swept += 1
        return swept

    def incoming(self) -> "Incoming":
        return Incoming(self, self._root / INCOMING / uuid.uuid4().hex)

    def reserve(self, size_bytes: int) -> None:
        with self._lock:
            if self._used_bytes + size_bytes > self._budget_bytes:
                raise _full(f"the blob budget of {self._budget_bytes} bytes is used up")
            self._used_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= size_bytes

    def publish(self, incoming: Path, scope: str, digest: str) -> bool:
        """Make a whole and synced file the blob; whether it was a new one."""
        path = self.path(scope, digest)
        with self._lock:
            if path.exists():
                os.utime(path)
                return False
            if not path.parent.exists():
                self._make_scope(path.parent.parent)
            incoming.rename(path)
            _sync_folder(path.parent)
            return True

    def _make_scope(self, scope: Path) -> None:
        """With all its folders at once, so that hardly any write has to wait for the disk to have a new one."""
        for folder in (scope, *(scope / f"{number:02x}" for number in range(256))):
            folder.mkdir(exist_ok=True)
        _sync_folder(scope)
        _sync_folder(self._root)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            size_bytes = path.stat().st_size
            path.unlink()
            self._used_bytes -= size_bytes

    def _all(self) -> Iterator[tuple[str, str, Path]]:
        for path in self._root.glob("[!.]*/??/*"):
            yield path.parent.parent.name, named(path.parent.name + path.name), path

    def _remove_leftovers(self) -> None:
        """A file whose writer lives is locked by it, and stays."""
        for path in (self._root / INCOMING).iterdir():
            with path.open("rb") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)


class Incoming:
    """One blob that is being written. A writer that gave up may call `discard` while another thread still writes."""

    def __init__(self, files: BlobFiles, path: Path) -> None:
        """Touches no disk before the first call."""
        self._files = files
        self._path = path
        self._lock = threading.Lock()
        self._hash = hashlib.sha256()
        self._head = b""
        self._size_bytes = 0
        self._file: FileIO | None = None
        self._discarded = False

    def write(self, chunk: bytes) -> None:
        """Add bytes. TooLarge above the blob limit, ResourceExhausted when there is no room."""
        with self._lock, _translated():
            file = self._opened()
            limit_bytes = self._files.blob_limit_bytes
            if self._size_bytes + len(chunk) > limit_bytes:
                raise TooLarge(f"a blob has at most {limit_bytes} bytes")
            self._files.reserve(len(chunk))
            self._size_bytes += len(chunk)
            self._hash.update(chunk)
            self._head = (self._head + chunk[:_HEAD_BYTES])[:_HEAD_BYTES]
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]

    def finish(self, scope: str, *, digest: str, size_bytes: int) -> BlobInfo:
        """Publish it, if it is what was announced; InvalidField otherwise."""
        with self._lock, _translated():
            file = self._opened()
            info = BlobInfo(
                scope=scope,
                digest=named(self._hash.hexdigest()),
                size_bytes=self._size_bytes,
                media_type=media_type_of(self._head),
            )
            check_announced(info, digest=digest, size_bytes=size_bytes)
            os.fsync(file.fileno())
            if self._files.publish(self._path, scope, info.digest):
                self._size_bytes = 0
            return info

    def discard(self) -> None:
        """Close the file, and remove it unless it was published."""
        with self._lock:
            self._discarded = True
            if self._file is not None:
                self._path.unlink(missing_ok=True)
                self._file.close()
            self._files.release(self._size_bytes)
            self._size_bytes = 0

    def _opened(self) -> FileIO:
        if self._discarded:
            raise Cancelled("nobody waits for this blob any more")
        if self._file is None:
            self._file = self._path.open("xb", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self._file


def check_announced(info: BlobInfo, *, digest: str, size_bytes: int) -> None:
    """InvalidField when the bytes are not those that were announced; an empty digest and size 0 announce nothing."""
    if size_bytes and info.size_bytes != size_bytes:
        raise InvalidField(f"is {size_bytes}, but {info.size_bytes} bytes came", field="size_bytes")
    if digest and info.digest != digest:
        raise InvalidField(f"the bytes hash to {info.digest}", field="digest")


def _full(message: str) -> ResourceExhausted:
    return ResourceExhausted(message, retry_after_s=FULL_RETRY_AFTER_S)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _of_os(error) from error


def _of_os(error: OSError) -> FanlightError:
    if error.errno in _FULL:
        return _full("the disk for blobs is full")
    return NodeFault(f"the disk for blobs fails: {os.strerror(error.errno or errno.EIO)}")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
