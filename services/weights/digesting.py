"""All digests of a file in one reading from its first byte on: its own, those of its tensors, and AutoV3.

Fed while the file still comes. Knows no file and no network.
"""

import hashlib
from dataclasses import dataclass

from services.weights.manifest import TensorTable
from services.weights.tensors import LENGTH_BYTES, BadHeader, header_length, parse_header, with_digests


@dataclass(frozen=True, slots=True, kw_only=True)
class Digested:
    """`table` has the digests of every tensor; None where the file is no safetensors or, says `fault`, no sound one."""

    sha256: str
    table: TensorTable | None = None
    # sha256 of what follows the header; empty without one.
    autov3: str = ""
    fault: BadHeader | None = None


class FileDigests:
    """Blocking; give it the file's bytes in order."""

    def __init__(self, *, size_bytes: int, is_safetensors: bool) -> None:
        self._size_bytes = size_bytes
        self._is_wanted = is_safetensors
        self._whole = hashlib.sha256()
        self._body = hashlib.sha256()
        self._one = hashlib.sha256()
        self._head = bytearray()
        self._table: TensorTable | None = None
        self._fault: BadHeader | None = None
        self._digests: list[str] = []
        self._at = 0

    def update(self, block: bytes) -> None:
        self._whole.update(block)
        if self._is_wanted and self._fault is None:
            try:
                self._read_tensors(block if self._table else self._read_header(block))
            except BadHeader as error:
                self._fault = error

    def _read_header(self, block: bytes) -> bytes:
        """Keep bytes until the header is whole; what follows it."""
        self._head += block
        if len(self._head) < LENGTH_BYTES:
            return b""
        end = LENGTH_BYTES + header_length(bytes(self._head[:LENGTH_BYTES]))
        if len(self._head) < end:
            return b""
        first, header = bytes(self._head[:LENGTH_BYTES]), bytes(self._head[LENGTH_BYTES:end])
        self._table = parse_header(first, header, size_bytes=self._size_bytes)
        rest, self._at = bytes(self._head[end:]), end
        self._head.clear()
        return rest

    def _read_tensors(self, block: bytes) -> None:
        if self._table is None:
            return
        self._body.update(block)
        view = memoryview(block)
        while view and len(self._digests) < len(self._table.tensors):
            left = self._table.tensors[len(self._digests)].end - self._at
            self._one.update(view[:left])
            self._at += min(left, len(view))
            view = view[left:]
            self._end_tensors()

    def _end_tensors(self) -> None:
        """Close every tensor that ends here; empty ones end where they begin."""
        assert self._table is not None
        tensors = self._table.tensors
        while len(self._digests) < len(tensors) and tensors[len(self._digests)].end == self._at:
            self._digests.append(self._one.hexdigest())
            self._one = hashlib.sha256()

    def finish(self) -> Digested:
        sha256 = self._whole.hexdigest()
        if self._is_wanted and self._table is None and self._fault is None:
            self._fault = BadHeader("shorter than its header")
        if self._table is None or self._fault is not None:
            return Digested(sha256=sha256, fault=self._fault)
        self._end_tensors()
        digests = {t.name: digest for t, digest in zip(self._table.tensors, self._digests, strict=True)}
        return Digested(sha256=sha256, table=with_digests(self._table, digests), autov3=self._body.hexdigest())
