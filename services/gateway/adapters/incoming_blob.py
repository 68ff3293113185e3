"""One blob on its way into a folder of blobs, in blocking calls. Knows no event loop."""

import contextlib
import fcntl
import hashlib
import os
import threading
import uuid
from io import FileIO

from fanlight.contract.digests import named
from fanlight.errors import Cancelled, FanlightError, NodeFault, TooLarge
from services.gateway.adapters.blob_files import HEAD_BYTES, BlobFiles, check_announced, translated
from services.kernel.blobs import BlobInfo
from services.kernel.media import media_type_of


class IncomingBlob:
    """Bytes are held until `flush` or `finish` writes them. A writer that gave up may call `discard` while another
    thread still writes."""

    def __init__(self, files: BlobFiles) -> None:
        """Touches no disk before the first `flush` or `finish`."""
        self._files = files
        self._path = files.incoming(uuid.uuid4().hex)
        self._lock = threading.Lock()
        self._hash = hashlib.sha256()
        self._held: list[bytes] = []
        self._head = b""
        self._size_bytes = 0
        self._reserved_bytes = 0
        self._file: FileIO | None = None
        self._published: BlobInfo | None = None
        self._is_new = False
        self._discarded = False

    def hold(self, chunk: bytes) -> int:
        """Add bytes; how many pieces are held. TooLarge above the blob limit."""
        limit_bytes = self._files.blob_limit_bytes
        if self._size_bytes + len(chunk) > limit_bytes:
            raise TooLarge(f"a blob has at most {limit_bytes} bytes")
        self._size_bytes += len(chunk)
        self._held.append(chunk)
        return len(self._held)

    def flush(self) -> None:
        """Write what is held. ResourceExhausted when there is no room."""
        with self._lock, translated():
            self._write()

    def _write(self) -> None:
        if self._discarded:
            raise Cancelled("nobody waits for this blob any more")
        if self._file is None:
            self._file = self._path.open("xb", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        held, self._held = self._held, []
        size_bytes = sum(map(len, held))
        self._files.reserve(size_bytes)
        self._reserved_bytes += size_bytes
        for chunk in held:
            if len(self._head) < HEAD_BYTES:
                self._head = (self._head + chunk[:HEAD_BYTES])[:HEAD_BYTES]
            self._hash.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) :]

    def finish(self, scope: str, *, digest: str, size_bytes: int) -> tuple[BlobInfo, tuple[bytes, ...]]:
        """Publish it, if it is what was announced; InvalidField otherwise. `settle` must follow.

        Its bytes too, if they were all held until now.
        """
        with self._lock, translated():
            held = tuple(self._held)
            self._write()
            assert self._file is not None
            info = BlobInfo(
                scope=scope,
                digest=named(self._hash.hexdigest()),
                size_bytes=self._size_bytes,
                media_type=media_type_of(self._head),
            )
            check_announced(info, digest=digest, size_bytes=size_bytes)
            self._is_new = self._files.publish(self._path, self._file, scope, info.digest)
            if not self._is_new:
                self._files.release(self._reserved_bytes)
            self._reserved_bytes = 0
            self._published = info
            return info, held if sum(map(len, held)) == self._size_bytes else ()

    def settle(self) -> None:
        """What was published survives a power cut from now on; or it is taken away again, with an error."""
        with self._lock, translated():
            if self._file is None or self._published is None:
                return
            scope, digest = self._published.scope, self._published.digest
            try:
                if self._is_new:
                    os.fsync(self._file.fileno())
                elif self._files.stat(scope, digest, settled=True) is None:
                    raise NodeFault("the disk for blobs lost what somebody else was writing")
            except OSError:
                self._files.delete(scope, digest)
                raise
            finally:
                self._close()

    def discard(self) -> None:
        """Leave nothing of it, unless it was published. Nobody is left to tell that the disk did not take that."""
        with contextlib.suppress(FanlightError):
            self.settle()
        with self._lock, translated():
            self._discarded = True
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
        self._files.release(self._reserved_bytes)
        self._reserved_bytes = 0
