"""Lossless packing of weights: the bytes of each number sorted into planes, each plane compressed if that helps.

Byte planes as in Blosc's shuffle filter: trained fp16 numbers have similar signs and exponents, so the plane of the
high bytes shrinks to about two thirds; the low bytes are noise. A packed file is a sequence of independent frames.
Knows no network.
"""

import asyncio
import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.weights.errors import WrongBytes
from services.weights.planning.selection import part_of, part_of_vae
from services.weights.references.manifest import ByteSpan, PackedFrame, TensorEntry, TensorTable
from services.weights.references.tensors import DTYPE_BITS, Digested, FileDigests
from services.weights.transfer.pacing import DownloadTools
from services.weights.transfer.partial import PartialFile, begin_writing

# Frames have about this many bytes of the original, and end where a part of the model ends.
FRAME_BYTES = 4 * 1024 * 1024
FRAME_MIN_BYTES = 1024 * 1024
LEVEL = 1
# A plane that does not compress below this fraction stays uncompressed.
WORTH = 0.98
_RAW, _ZSTD = 0, 1
_PLANE = struct.Struct("<BI")


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of the original that become one frame; `width`: bytes of one number."""

    span: ByteSpan
    width: int


def blocks_of(size_bytes: int, table: TensorTable | None) -> Iterator[Block]:
    """Cut a file into frames: the header, then tensors, so that no frame contains two parts of a model."""
    if table is None:
        yield from _cut(0, size_bytes, 1)
        return
    yield from _cut(0, table.header_bytes, 1)
    begin, kind = table.header_bytes, None
    for tensor in table.tensors:
        is_full = tensor.begin - begin >= FRAME_MIN_BYTES
        if kind is not None and tensor.begin > begin and (is_full or _kind(tensor) != kind):
            yield from _cut(begin, tensor.begin, kind[0])
            begin = tensor.begin
        if tensor.size_bytes:
            kind = _kind(tensor)
    yield from _cut(begin, size_bytes, kind[0] if kind else 1)


def _kind(tensor: TensorEntry) -> tuple[int, str, str]:
    return max(1, DTYPE_BITS[tensor.dtype] // 8), part_of(tensor.name), part_of_vae(tensor.name)


def _cut(begin: int, end: int, width: int) -> Iterator[Block]:
    for at in range(begin, end, FRAME_BYTES):
        yield Block(ByteSpan(at, min(at + FRAME_BYTES, end)), width)


def pack(data: bytes, width: int) -> bytes:
    """Pack one frame."""
    import numpy as np
    import zstandard

    if width == 1 or len(data) % width:
        planes = [data]
    else:
        numbers = np.frombuffer(data, np.uint8).reshape(-1, width)
        planes = [numbers[:, plane].tobytes() for plane in range(width)]
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False, write_checksum=False)
    head, bodies = bytearray([len(planes)]), []
    for plane in planes:
        small = compressor.compress(plane)
        is_worth = len(small) < WORTH * len(plane)
        bodies.append(small if is_worth else plane)
        head += _PLANE.pack(_ZSTD if is_worth else _RAW, len(bodies[-1]))
    return bytes(head) + b"".join(bodies)


def unpack(frame: bytes, size_bytes: int) -> bytes:
    """Unpack a frame to its original `size_bytes` bytes. WrongBytes if it is not such a frame."""
    import numpy as np

    planes = list(_planes(frame, size_bytes))
    if len(planes) == 1:
        return planes[0]
    numbers = np.empty((size_bytes // len(planes), len(planes)), np.uint8)
    for number, plane in enumerate(planes):
        numbers[:, number] = np.frombuffer(plane, np.uint8)
    return numbers.tobytes()


def _planes(frame: bytes, size_bytes: int) -> Iterator[bytes]:
    import zstandard

    count = frame[0] if frame else 0
    if not count or size_bytes % count or len(frame) < 1 + count * _PLANE.size:
        raise WrongBytes("a packed frame has an invalid header")
    each, at = size_bytes // count, 1 + count * _PLANE.size
    decompressor: Any = zstandard.ZstdDecompressor()
    for number in range(count):
        kind, length = _PLANE.unpack_from(frame, 1 + number * _PLANE.size)
        body = frame[at : at + length]
        at += length
        try:
            plane = decompressor.decompress(body, max_output_size=each) if kind == _ZSTD else body
        except zstandard.ZstdError as error:
            raise WrongBytes(f"a packed frame cannot be decompressed: {error}") from error
        if len(plane) != each:
            raise WrongBytes(f"a plane of a packed frame has {len(plane)} bytes instead of {each}")
        yield plane
    if at != len(frame):
        raise WrongBytes("a packed frame has extra bytes")


def pack_file(path: Path, sha256: str, table: TensorTable | None, out: Path) -> tuple[PackedFrame, ...]:
    """Write the packed form of the file to `out`. WrongBytes if the file does not have this sha256."""
    frames, at, digest = [], 0, hashlib.sha256()
    with path.open("rb") as source, out.open("wb") as target:
        for block in blocks_of(path.stat().st_size, table):
            data = source.read(len(block.span))
            digest.update(data)
            packed = pack(data, block.width)
            target.write(packed)
            frames.append(PackedFrame(block.span, ByteSpan(at, at + len(packed)), hashlib.sha256(packed).hexdigest()))
            at += len(packed)
    if digest.hexdigest() != sha256:
        raise WrongBytes(f"the object {sha256[:12]} is damaged; run verify")
    return tuple(frames)


class StreamingUnpacker:
    """Unpacks a download of contiguous frames to `out`, frame by frame, while the rest still arrives.

    `is_safetensors` is None if the frames are not the whole file; then the file is not digested.
    """

    def __init__(
        self,
        part: PartialFile,
        tools: DownloadTools,
        frames: Sequence[PackedFrame],
        out: Path,
        *,
        is_safetensors: bool | None,
    ) -> None:
        self._part = part
        self._tools = tools
        self._frames = frames
        size = sum(len(frame.span) for frame in frames)
        self._digests = None if is_safetensors is None else FileDigests(size_bytes=size, is_safetensors=is_safetensors)
        self._file = out.open("wb", buffering=0)
        self._next = 0
        # Offset of the next frame in the download, and of its bytes in the file.
        self._at = 0
        self._written = 0
        self._bad: list[ByteSpan] = []
        self._task: asyncio.Task[None] | None = None

    def advance(self) -> None:
        is_idle = self._task is None or self._task.done()
        if is_idle and not self._bad and self._has_arrived(self._part.map.frontier):
            self._task = asyncio.create_task(self._unpack_until(self._part.map.frontier))

    def _has_arrived(self, frontier: int) -> bool:
        return self._next < len(self._frames) and self._at + len(self._frames[self._next].packed) <= frontier

    async def _unpack_until(self, frontier: int) -> None:
        while self._has_arrived(frontier):
            await self._tools.run(self._one)

    def _one(self) -> None:
        """Unpack the next frame; after a wrong one, the others are only checked."""
        frame = self._frames[self._next]
        place = ByteSpan(self._at, self._at + len(frame.packed))
        data = self._part.read(place.begin, len(place))
        if hashlib.sha256(data).hexdigest() != frame.sha256:
            self._bad.append(place)
        elif not self._bad:
            self._write(unpack(data, len(frame.span)))
        self._next, self._at = self._next + 1, place.end

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        begin_writing(self._file.fileno(), self._written, len(data))
        self._written += len(data)
        if self._digests:
            self._digests.update(data)

    async def finish(self) -> Digested | None:
        """WrongBytes if frames were wrong; they are marked as missing again."""
        if self._task is not None:
            await self._task
        await self._unpack_until(self._part.map.size)
        for place in self._bad:
            self._part.drop(place)
        if self._bad:
            raise WrongBytes(f"{len(self._bad)} of {len(self._frames)} packed frames have wrong bytes")
        return self._digests.finish() if self._digests else None

    async def stop(self) -> None:
        """Wait until no thread reads the download."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._file.close()
