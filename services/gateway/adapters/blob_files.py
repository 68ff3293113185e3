"""Blobs as files of one folder, in blocking calls that any thread may make.

Knows no event loop.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from fanlight.contract.names import named, parse_digest, parse_scope
from fanlight.errors import FanlightError, InvalidField, NodeFault, ResourceExhausted, Unavailable
from services.gateway.adapters.seal_format import FOOTER_BYTES, BlobSealer, is_whole
from services.gateway.ports import Erased
from services.kernel.blobs import BlobInfo, Keep, media_type_of
from services.kernel.disks import RETRY_AFTER_S, is_no_room, is_of_disk, why
from services.kernel.logs import get_logger
from services.kernel.private_files import FOLDER_MODE, close_tree, private

log = get_logger()

# No scope can have this name.
INCOMING = ".incoming"
FULL_RETRY_AFTER_S = 60.0
HEAD_BYTES = 16
PROBE_BYTES = 64 * 1024
LOST_RETRY_AFTER_S = 30.0
# The disk takes no bytes: why.
_FULL = {
    errno.ENOSPC: "the disk for blobs is full",
    errno.EDQUOT: "the quota of the disk for blobs is used up",
    errno.EROFS: "the disk for blobs is read-only",
}
# Errors of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class StoredTail:
    """How many bytes a blob takes where it is stored, and the last of them."""

    stored_bytes: int
    data: bytes


class BlobFiles:
    """`{root}/{scope}/ab/cdef...`; a file is written in `{root}/.incoming` and published when it is complete.

    A blob keeps a second hard link there until it is synced: one sync after both links exist makes the bytes and the
    name durable, on file systems that keep the order of writes. A reader that finds two links and needs durability
    syncs first; a file that still has two links when a process starts is hashed, because a power cut may have lost
    its bytes.
    """

    def __init__(self, root: Path, *, budget_bytes: int, blob_limit_bytes: int) -> None:
        """Creates the folder, removes unfinished files of an earlier process, and counts the blobs' bytes."""
        self._root = root
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self.blob_limit_bytes = blob_limit_bytes
        # Why the folder is lost; empty while it is there. Why the disk takes no bytes, and since when.
        self._lost, self._full, self._full_s = "", "", 0.0
        root.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        close_tree(root)
        (root / INCOMING).mkdir(mode=FOLDER_MODE, exist_ok=True)
        self._identity = _identity_of(root)
        self._try_writing()
        self._remove_leftovers()
        self._scope_bytes: Counter[str] = Counter()
        for scope, _, path in self._all():
            self._scope_bytes[scope] += path.stat().st_size
        self._used_bytes = self._scope_bytes.total()

    def _try_writing(self) -> None:
        """A full disk is a fault that may pass; any other error is raised."""
        try:
            self._write_some()
        except OSError as error:
            if not is_no_room(error):
                raise
            self._note_full(self._words(error))

    def _write_some(self) -> None:
        """As many bytes as a small image has, and away with them."""
        path = self.incoming(uuid.uuid4().hex)
        try:
            with open(path, "xb", opener=private) as file:
                file.write(bytes(PROBE_BYTES))
        finally:
            path.unlink(missing_ok=True)

    def probe(self) -> None:
        """Unavailable where no bytes can be written."""
        with self.translated():
            self.check()
            self._write_some()
        self._full = ""

    @property
    def fault(self) -> str:
        """As last seen: why it takes no blobs; empty while it does."""
        return self._lost or (self._full if time.monotonic() - self._full_s < FULL_RETRY_AFTER_S else "")

    def _note_full(self, words: str) -> None:
        if not self.fault:
            log.error("blobs_not_written", why=words)
        self._full, self._full_s = words, time.monotonic()

    def check(self) -> None:
        """Unavailable where the folder is no longer the one of the start: deleted, replaced, or not mounted."""
        try:
            is_there = _identity_of(self._root) == self._identity
        except OSError:
            is_there = False
        if not is_there:
            words = f"the folder of blobs, {self._root}, was removed or replaced; put it back, or restart the gateway"
            if not self._lost:
                log.error("blobs_lost", why=words)
            self._lost = words
            raise Unavailable(words, retry_after_s=LOST_RETRY_AFTER_S)
        self._lost = ""

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of the disk as ours."""
        try:
            yield
        except OSError as error:
            raise self._of_os(error) from error

    def _of_os(self, error: OSError) -> FanlightError:
        if error.errno in _FULL:
            self._note_full(self._words(error))
            return Unavailable(self._words(error), retry_after_s=FULL_RETRY_AFTER_S)
        try:
            self.check()
        except Unavailable as lost:
            return lost
        if is_of_disk(error):
            return Unavailable(f"the disk for blobs, {self._root}, fails: {why(error)}", retry_after_s=RETRY_AFTER_S)
        return NodeFault(f"the disk for blobs, {self._root}, fails: {os.strerror(error.errno or errno.EIO)}")

    def _words(self, error: OSError) -> str:
        return f"{_FULL[error.errno or 0]} ({self._root})"

    @property
    def used_bytes(self) -> int:
        """Bytes of the blobs, and of those being written."""
        return self._used_bytes

    def used_bytes_of(self, scope: str) -> int:
        return self._scope_bytes[scope]

    def path(self, scope: str, digest: str) -> Path:
        """The blob's path, if it is stored. InvalidField for names that could lead out of the folder."""
        name = parse_digest(digest, field="digest").removeprefix("sha256:")
        return self._root / parse_scope(scope, field="scope") / name[:2] / name[2:]

    def open(self, scope: str, digest: str) -> FileIO | None:
        """None if it is not stored. Unavailable where no blob is any more."""
        try:
            return self.path(scope, digest).open("rb", buffering=0)
        except FileNotFoundError:
            self.check()
            return None

    def stat(self, scope: str, digest: str, *, settled: bool = False) -> BlobInfo | None:
        """Marks it as used: its modification time is the time of its last use. `settled`: durable on return."""
        with self.translated(), contextlib.ExitStack() as until_return:
            with self._lock:
                file = self.open(scope, digest)
                if file is None:
                    return None
                until_return.enter_context(file)
                _mark_used(file.fileno())
            found = os.fstat(file.fileno())
            if settled and found.st_nlink > 1:
                os.fsync(file.fileno())
            return BlobInfo(
                scope=scope,
                digest=digest,
                size_bytes=found.st_size,
                media_type=media_type_of(file.read(HEAD_BYTES)),
            )

    def tail(self, scope: str, digest: str, *, settled: bool = False) -> StoredTail | None:
        """Marks it as used, and settles it, as `stat` does."""
        with self.translated(), contextlib.ExitStack() as until_return:
            with self._lock:
                file = self.open(scope, digest)
                if file is None:
                    return None
                until_return.enter_context(file)
                _mark_used(file.fileno())
            found = os.fstat(file.fileno())
            if settled and found.st_nlink > 1:
                os.fsync(file.fileno())
            return _tail_of(file.fileno(), found.st_size)

    def tails(self) -> Iterator[tuple[str, StoredTail]]:
        """Of every blob, with its scope; marks none as used."""
        with self.translated():
            for scope, _, path in self._all():
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                    yield scope, _tail_of(file.fileno(), os.fstat(file.fileno()).st_size)

    def erase(self, scope: str) -> Erased:
        """Delete all blobs of the scope."""
        erased = remaining = 0
        with self.translated():
            for each, _, path in self._all():
                if each == parse_scope(scope, field="scope"):
                    try:
                        with self._lock:
                            self._remove(path)
                        erased += 1
                    except OSError as error:
                        log.error("blob_not_erased", path=str(path), why=error.strerror)
                        remaining += 1
        return Erased(blobs=erased, remaining=remaining)

    def delete(self, scope: str, digest: str) -> None:
        with self.translated(), self._lock:
            self._remove(self.path(scope, digest))

    def sweep(self, *, before_s: float, keep: Keep) -> int:
        """Delete blobs last used before that time; returns how many. Raises the error of the last file that failed."""
        swept, failure = 0, None
        with self.translated():
            for scope, digest, path in self._all():
                needed = keep(scope, digest)
                try:
                    with self._lock:
                        swept += self._sweep_one(path, before_s, needed=needed)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    failure = error
            if failure is not None:
                raise failure
        return swept

    def _sweep_one(self, path: Path, before_s: float, *, needed: bool) -> bool:
        if needed:
            os.utime(path)
            return False
        if path.stat().st_mtime >= before_s:
            return False
        self._remove(path)
        return True

    def incoming(self, name: str) -> Path:
        return self._root / INCOMING / name

    def create(self, incoming: Path) -> FileIO:
        """A new file for a blob on its way in."""
        self.check()
        try:
            return open(incoming, "xb", buffering=0, opener=private)
        except FileNotFoundError:
            incoming.parent.mkdir(mode=FOLDER_MODE, exist_ok=True)
            return open(incoming, "xb", buffering=0, opener=private)

    def reserve(self, size_bytes: int) -> None:
        with self._lock:
            if self._used_bytes + size_bytes > self._budget_bytes:
                message = f"the blob budget of {self._budget_bytes} bytes is used up"
                raise ResourceExhausted(message, retry_after_s=FULL_RETRY_AFTER_S)
            self._used_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= size_bytes

    def publish(self, incoming: Path, file: FileIO, scope: str, digest: str, sealer: BlobSealer | None = None) -> bool:
        """Make a complete file the blob; returns whether the blob is new. It is durable once the file is synced.

        A sealed blob replaces one in clear, and one that cannot be opened.
        """
        path = self.path(scope, digest)
        with self._lock:
            if sealer is not None:
                self._remove_unsealed(path, scope, digest, sealer)
            try:
                self._link(incoming, path)
            except FileExistsError:
                _mark_used(path)
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if not _moved(incoming, file, path):
                    return False
            self._full = ""
            self._scope_bytes[scope] += path.stat().st_size
            return True

    def _remove_unsealed(self, path: Path, scope: str, digest: str, sealer: BlobSealer) -> None:
        try:
            with path.open("rb") as file:
                tail = _tail_of(file.fileno(), os.fstat(file.fileno()).st_size)
        except FileNotFoundError:
            return
        if not sealer.keeps(scope, digest, tail.data, tail.stored_bytes):
            self._remove(path)

    def _link(self, incoming: Path, path: Path) -> None:
        if not path.parent.exists():
            self._make_scope(path.parent.parent)
        os.link(incoming, path)

    def _make_scope(self, scope: Path) -> None:
        """With all its folders at once, so that hardly any write has to sync a new folder."""
        for folder in (scope, *(scope / f"{number:02x}" for number in range(256))):
            folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        _sync_folder(scope)
        _sync_folder(self._root)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            size_bytes = path.stat().st_size
            path.unlink()
            self._used_bytes -= size_bytes
            self._scope_bytes[path.parent.parent.name] -= size_bytes

    def _all(self) -> Iterator[tuple[str, str, Path]]:
        for path in self._root.glob("[!.]*/??/*"):
            yield path.parent.parent.name, named(path.parent.name + path.name), path

    def _remove_leftovers(self) -> None:
        """Keeps a file that a live writer has locked. One with two links is removed after its blob was hashed."""
        unsettled: dict[int, Path] = {}
        for path in (self._root / INCOMING).iterdir():
            with path.open("rb") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = os.fstat(file.fileno())
                if found.st_nlink > 1:
                    os.fsync(file.fileno())
                    unsettled[found.st_ino] = path
                else:
                    path.unlink(missing_ok=True)
        for _, digest, path in self._all() if unsettled else ():
            if path.stat().st_ino in unsettled and not _is_complete(path, digest):
                path.unlink()
        for path in unsettled.values():
            path.unlink(missing_ok=True)


def check_announced(info: BlobInfo, *, digest: str, size_bytes: int) -> None:
    """InvalidField if the bytes are not the announced ones; an empty digest and size 0 announce nothing."""
    if size_bytes and info.size_bytes != size_bytes:
        raise InvalidField(f"is {size_bytes}, but {info.size_bytes} bytes came", field="size_bytes")
    if digest and info.digest != digest:
        raise InvalidField(f"the bytes hash to {info.digest}", field="digest")


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return named(hashlib.file_digest(file, "sha256").hexdigest())


def _is_complete(path: Path, digest: str) -> bool:
    """Whether a power cut has lost none of its bytes."""
    with path.open("rb") as file:
        tail = _tail_of(file.fileno(), os.fstat(file.fileno()).st_size)
        is_complete = is_whole(iter(partial(file.read, PROBE_BYTES), b""), tail.data)
    return _digest_of(path) == digest if is_complete is None else is_complete


def _tail_of(fd: int, stored_bytes: int) -> StoredTail:
    data = os.pread(fd, FOOTER_BYTES, max(0, stored_bytes - FOOTER_BYTES))
    return StoredTail(stored_bytes, data)


def _moved(incoming: Path, file: FileIO, path: Path) -> bool:
    """For file systems without hard links, with two syncs; returns whether the blob is new."""
    if path.exists():
        os.utime(path)
        return False
    os.fsync(file.fileno())
    incoming.rename(path)
    _sync_folder(path.parent)
    return True


def _mark_used(file: Path | int) -> None:
    """A disk that takes no bytes is read all the same."""
    try:
        os.utime(file)
    except OSError as error:
        if error.errno not in _FULL:
            raise


def _identity_of(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
