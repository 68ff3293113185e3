"""A blob on its way into a folder, in blocking calls that any thread may make: in clear, or sealed as it comes."""

import contextlib
import fcntl
import hashlib
import os
import threading
import uuid
from io import FileIO

from fanlight.contract.names import named
from fanlight.errors import Cancelled, FanlightError, TooLarge, Unavailable
from services.gateway.adapters.blob_files import HEAD_BYTES, BlobFiles, check_announced
from services.gateway.adapters.seal_format import BlobSealer
from services.kernel.blobs import BlobInfo, media_type_of
from services.kernel.disks import RETRY_AFTER_S


class IncomingBlob:
    """A blob that is being written: bytes are buffered until `flush` or `finish` writes them.

    A writer that gave up may call `discard` while another thread still writes.
    """

    def __init__(self, files: BlobFiles, sealer: BlobSealer | None = None) -> None:
        """Does not touch the disk before the first `flush` or `finish`. `sealer`: what is written is sealed."""
        self._files, self._sealer = files, sealer
        self._path = files.incoming(uuid.uuid4().hex)
        self._lock = threading.Lock()
        self._hash = hashlib.sha256()
        self._buffered: list[bytes] = []
        self._head = b""
        self._size_bytes = 0
        self._reserved_bytes = 0
        self._file: FileIO | None = None
        self._published: BlobInfo | None = None
        self._is_new = False
        self._discarded = False

    def buffer(self, chunk: bytes) -> int:
        """Add bytes; returns how many pieces are buffered. TooLarge above the blob limit."""
        limit_bytes = self._files.blob_limit_bytes
        if self._size_bytes + len(chunk) > limit_bytes:
            raise TooLarge(f"a blob has at most {limit_bytes} bytes")
        self._size_bytes += len(chunk)
        self._buffered.append(chunk)
        return len(self._buffered)

    def flush(self) -> None:
        """Write the buffer. ResourceExhausted when the budget is used up."""
        with self._lock, self._files.translated():
            self._write()

    def _write(self) -> None:
        if self._discarded:
            raise Cancelled("the writer of this blob has given up")
        if self._file is None:
            self._file = self._files.create(self._path)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        buffered, self._buffered = self._buffered, []
        for chunk in buffered:
            if self._sealer is not None:
                self._put(b"".join(self._sealer.take(chunk)))
                continue
            if len(self._head) < HEAD_BYTES:
                self._head = (self._head + chunk[:HEAD_BYTES])[:HEAD_BYTES]
            self._hash.update(chunk)
            self._put(chunk)

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._files.reserve(len(data))
        self._reserved_bytes += len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def finish(self, scope: str, *, digest: str, size_bytes: int) -> tuple[BlobInfo, tuple[bytes, ...]]:
        """Publish it, if it is what was announced; InvalidField otherwise. `settle` must follow.

        Also returns its bytes, if all of them were still buffered.
        """
        with self._lock, self._files.translated():
            buffered = tuple(self._buffered)
            self._write()
            assert self._file is not None
            info = self._identify(scope)
            check_announced(info, digest=digest, size_bytes=size_bytes)
            self._is_new = self._files.publish(self._path, self._file, scope, info.digest, self._sealer)
            if not self._is_new:
                self._files.release(self._reserved_bytes)
            self._reserved_bytes = 0
            self._published = info
            return info, buffered if sum(map(len, buffered)) == self._size_bytes else ()

    def _identify(self, scope: str) -> BlobInfo:
        if self._sealer is not None:
            info, last = self._sealer.finish(scope)
            self._put(b"".join(last))
            return info
        return BlobInfo(
            scope=scope,
            digest=named(self._hash.hexdigest()),
            size_bytes=self._size_bytes,
            media_type=media_type_of(self._head),
        )

    def settle(self) -> None:
        """Make the published blob durable against a power cut; if that fails, delete it and raise."""
        with self._lock, self._files.translated():
            if self._file is None or self._published is None:
                return
            scope, digest = self._published.scope, self._published.digest
            try:
                if self._is_new:
                    os.fsync(self._file.fileno())
                elif self._files.stat(scope, digest, settled=True) is None:
                    message = "another write of this blob failed on the disk; write it again"
                    raise Unavailable(message, retry_after_s=RETRY_AFTER_S)
            except OSError:
                self._files.delete(scope, digest)
                raise
            finally:
                self._close()

    def discard(self) -> None:
        """Remove it, unless it was published. An error of the disk is ignored: no caller is left to report it to."""
        with contextlib.suppress(FanlightError):
            self.settle()
        with self._lock, self._files.translated():
            self._discarded = True
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
        self._files.release(self._reserved_bytes)
        self._reserved_bytes = 0
