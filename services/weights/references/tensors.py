"""The safetensors format: header parsed strictly, canonical header, digests of a file in one pass. Needs no torch.

File layout: 8 bytes little-endian header length, a JSON header, the tensors' bytes without gaps.
Knows no network and no store.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from fanlight.errors import FailedPrecondition
from services.kernel.files import StrangeFile, open_ordinary
from services.weights.references.manifest import TensorEntry, TensorTable

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 100_000
# More overflow what libraries count with.
MAX_ELEMENTS = 2**60
MAX_DIMENSIONS = 16
# The first tensor of a canonical file begins at a multiple of this.
ALIGNMENT_BYTES = 64
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}

READ_BYTES = 4 * 1024 * 1024


class BadHeader(FailedPrecondition):
    """The file is not a valid safetensors file, or not of its name's kind; the message says why."""

    reason = "BAD_WEIGHTS"


def header_length(first: bytes) -> int:
    """The length of the JSON header from the first 8 bytes of a file."""
    if len(first) < LENGTH_BYTES:
        raise BadHeader("shorter than the 8-byte header length of every safetensors file")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise BadHeader(f"the header has {length} bytes; it must have 2 to {MAX_HEADER_BYTES}")
    return length


def parse_header(first: bytes, header: bytes, *, size_bytes: int) -> TensorTable:
    """The tensor table, in byte order, of a file of `size_bytes` with these first 8 bytes and this JSON header.

    BadHeader on overlaps, gaps, unknown dtypes, sizes that contradict shapes, or a file too short or too long.
    """
    length = header_length(first)
    if len(header) != length:
        raise BadHeader(f"the header is cut off: {len(header)} of {length} bytes")
    start = LENGTH_BYTES + length
    rows = _load(header)
    rows.pop("__metadata__", None)
    if len(rows) > MAX_TENSORS:
        raise BadHeader(f"{len(rows)} tensors; the limit is {MAX_TENSORS}")
    tensors = sorted((_entry(name, row, start) for name, row in rows.items()), key=lambda t: (t.begin, t.end, t.name))
    _check_layout(tensors, start=start, size_bytes=size_bytes)
    return TensorTable(header_bytes=start, tensors=tuple(tensors))


def _load(header: bytes) -> dict[str, Any]:
    try:
        rows = json.loads(header, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadHeader("the header is not JSON") from error
    if not isinstance(rows, dict):
        raise BadHeader("the header is not a JSON object")
    metadata = rows.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadHeader("__metadata__ must map to strings")
    return rows


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise BadHeader("a name occurs twice in the header")
    return out


_ROW_KEYS = frozenset({"dtype", "shape", "data_offsets"})


def _entry(name: str, row: Any, start: int) -> TensorEntry:
    if not isinstance(row, dict) or row.keys() != _ROW_KEYS:
        raise BadHeader(f"{name[:80]!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadHeader(f"{name[:80]!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not _is_naturals(shape) or len(shape) > MAX_DIMENSIONS or not _is_naturals(offsets) or len(offsets) != 2:
        raise BadHeader(f"{name[:80]!r} has a bad shape or bad offsets")
    begin, end = offsets
    # Without its zeros, because libraries multiply from the left and overflow before they meet one.
    numbers = prod(shape)
    if (numbers or prod(filter(None, shape))) >= MAX_ELEMENTS:
        raise BadHeader(f"{name[:80]!r} has more elements than any file")
    if numbers * DTYPE_BITS[dtype] != (end - begin) * 8:
        raise BadHeader(f"{name[:80]!r}: {end - begin} bytes are not {dtype} of shape {shape}")
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def _is_naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    # Called for each of thousands of names; a generator takes twice as long.
    for item in value:  # noqa: SIM110
        if type(item) is not int or not 0 <= item < MAX_ELEMENTS:
            return False
    return True


def _check_layout(tensors: Sequence[TensorEntry], *, start: int, size_bytes: int) -> None:
    at = start
    for tensor in tensors:
        if tensor.begin != at:
            what = "overlaps another" if tensor.begin < at else "leaves a gap before it"
            raise BadHeader(f"{tensor.name[:80]!r} {what}")
        at = tensor.end
    if at != size_bytes:
        raise BadHeader(f"the tensors end at byte {at}, the file at {size_bytes}")


def canonical_header(tensors: Iterable[TensorEntry]) -> tuple[bytes, TensorTable]:
    """The canonical header for these tensors and their places: wide dtypes first, then by name; no metadata.

    Equal tensors give equal files, whatever file they came from, and every tensor is aligned.
    """
    ordered = sorted(tensors, key=lambda t: (-DTYPE_BITS[t.dtype], t.name))
    rows, at = {}, 0
    for tensor in ordered:
        rows[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size_bytes],
        }
        at += tensor.size_bytes
    body = json.dumps(rows, separators=(",", ":")).encode()
    body += b" " * (-(LENGTH_BYTES + len(body)) % ALIGNMENT_BYTES)
    start = LENGTH_BYTES + len(body)
    placed, at = [], start
    for tensor in ordered:
        placed.append(replace(tensor, begin=at, end=at + tensor.size_bytes))
        at += tensor.size_bytes
    return len(body).to_bytes(LENGTH_BYTES, "little") + body, TensorTable(header_bytes=start, tensors=tuple(placed))


def component_key(tensors: Iterable[TensorEntry]) -> str:
    """The digest of a set of tensors: the same for every file with exactly these tensors."""
    rows = sorted((t.name, t.dtype, list(t.shape), t.sha256) for t in tensors)
    assert all(row[3] for row in rows)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def with_digests(table: TensorTable, digests: Mapping[str, str]) -> TensorTable:
    return replace(table, tensors=tuple(replace(t, sha256=digests[t.name]) for t in table.tensors))


def read_table(path: Path) -> TensorTable:
    """The tensor table of a safetensors file, checked against its size. BadHeader. Blocking."""
    try:
        file = open_ordinary(path)
    except StrangeFile as error:
        raise BadHeader(str(error)) from error
    with file:
        first = file.read(LENGTH_BYTES)
        header = file.read(header_length(first))
        size_bytes = os.fstat(file.fileno()).st_size
    return parse_header(first, header, size_bytes=size_bytes)


def sha256_of(path: Path) -> str:
    return sha256_from(path, 0)


def sha256_from(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        file.seek(begin)
        return _digest(file.read, path.stat().st_size - begin)


def _digest(read: Callable[[int], bytes], count: int) -> str:
    digest = hashlib.sha256()
    while count and (block := read(min(READ_BYTES, count))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Digested:
    """Digests of one file. `table` has every tensor's; None if it is not safetensors, or not valid: see `fault`."""

    sha256: str
    table: TensorTable | None = None
    # sha256 of the bytes after the header (AutoV3); empty for other formats.
    autov3: str = ""
    fault: BadHeader | None = None


class FileDigests:
    """All digests of a file in one pass: its own, its tensors' and AutoV3. Feed it the bytes in order."""

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
        """Buffer bytes until the header is complete; return the bytes after it."""
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
        """Finish the digest of every tensor that ends here; empty tensors end where they begin."""
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
