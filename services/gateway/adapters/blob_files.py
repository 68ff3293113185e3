"""Blobs as files of one folder, in blocking calls that any thread may make. Knows no event loop."""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from fanlight.contract.digests import named, parse_digest, parse_scope
from fanlight.errors import FanlightError, InvalidField, NodeFault, ResourceExhausted, Unavailable
from services.kernel.blobs import BlobInfo, Keep
from services.kernel.media import media_type_of

# No scope can have this name.
INCOMING = ".incoming"
FULL_RETRY_AFTER_S = 60.0
HEAD_BYTES = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a file system says that gives a file one name only.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)


class BlobFiles:
    """`{root}/{scope}/ab/cdef...`; what is being written lies in `{root}/.incoming` until it is whole.

    A blob has a second name there until the disk has it: one sync after both names were given is enough for the bytes
    and for the name, where a file system keeps the order of what it writes down. Whoever finds two names syncs first;
    what still has two when a process starts is looked through, as a power cut may have taken its bytes.
    """

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

    def open(self, scope: str, digest: str) -> FileIO | None:
        """None where it is not kept."""
        try:
            return self.path(scope, digest).open("rb", buffering=0)
        except FileNotFoundError:
            return None

    def stat(self, scope: str, digest: str, *, settled: bool = False) -> BlobInfo | None:
        """Marks it as used: its time of change is the time of its last use. `settled`: the disk has it on return."""
        with translated(), contextlib.ExitStack() as until_told:
            with self._lock:
                file = self.open(scope, digest)
                if file is None:
                    return None
                until_told.enter_context(file)
                os.utime(file.fileno())
            found = os.fstat(file.fileno())
            if settled and found.st_nlink > 1:
                os.fsync(file.fileno())
            return BlobInfo(
                scope=scope,
                digest=digest,
                size_bytes=found.st_size,
                media_type=media_type_of(file.read(HEAD_BYTES)),
            )

    def delete(self, scope: str, digest: str) -> None:
        with translated(), self._lock:
            self._remove(self.path(scope, digest))

    def sweep(self, *, before_s: float, keep: Keep) -> int:
        """Delete what was last used before that time; how many there were. The last file that fails is told of."""
        swept, failure = 0, None
        with translated():
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

    def reserve(self, size_bytes: int) -> None:
        with self._lock:
            if self._used_bytes + size_bytes > self._budget_bytes:
                message = f"the blob budget of {self._budget_bytes} bytes is used up"
                raise ResourceExhausted(message, retry_after_s=FULL_RETRY_AFTER_S)
            self._used_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= size_bytes

    def publish(self, incoming: Path, file: FileIO, scope: str, digest: str) -> bool:
        """Make a whole file the blob; whether it was a new one. Once the file is synced the disk has the blob."""
        path = self.path(scope, digest)
        with self._lock:
            try:
                self._link(incoming, path)
            except FileExistsError:
                os.utime(path)
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _moved(incoming, file, path)
            return True

    def _link(self, incoming: Path, path: Path) -> None:
        if not path.parent.exists():
            self._make_scope(path.parent.parent)
        os.link(incoming, path)

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
        """A file whose writer lives is locked by it, and stays. One with two names goes when its blob was looked at."""
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
            if path.stat().st_ino in unsettled and _digest_of(path) != digest:
                path.unlink()
        for path in unsettled.values():
            path.unlink(missing_ok=True)


def check_announced(info: BlobInfo, *, digest: str, size_bytes: int) -> None:
    """InvalidField when the bytes are not those that were announced; an empty digest and size 0 announce nothing."""
    if size_bytes and info.size_bytes != size_bytes:
        raise InvalidField(f"is {size_bytes}, but {info.size_bytes} bytes came", field="size_bytes")
    if digest and info.digest != digest:
        raise InvalidField(f"the bytes hash to {info.digest}", field="digest")


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return named(hashlib.file_digest(file, "sha256").hexdigest())


def _moved(incoming: Path, file: FileIO, path: Path) -> bool:
    """The way of file systems without links, with two syncs; whether it was a new one."""
    if path.exists():
        os.utime(path)
        return False
    os.fsync(file.fileno())
    incoming.rename(path)
    _sync_folder(path.parent)
    return True


@contextlib.contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _of_os(error) from error


def _of_os(error: OSError) -> FanlightError:
    if error.errno in _FULL:
        return Unavailable("the disk for blobs is full", retry_after_s=FULL_RETRY_AFTER_S)
    return NodeFault(f"the disk for blobs fails: {os.strerror(error.errno or errno.EIO)}")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
