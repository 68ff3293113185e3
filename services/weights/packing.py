"""Weights in fewer bytes without loss: the bytes of each number sorted into planes, and those compressed that can be.

Trained fp16 numbers differ little in sign and exponent: the plane of the high bytes shrinks to about two thirds, the
low bytes are noise and stay as they are. A packed file is a row of frames, each on its own. Pure; knows no manifest's
names and no network.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from services.weights.chunks import Span
from services.weights.components import part_of, part_of_vae
from services.weights.errors import WrongBytes
from services.weights.manifest import TensorEntry, TensorTable
from services.weights.tensors import DTYPE_BITS

# Frames end with a part of a model, else hold about so many bytes of the original.
FRAME_BYTES = 4 * 1024 * 1024
FRAME_MIN_BYTES = 1024 * 1024
LEVEL = 1
# What compresses less than this is left as it is.
WORTH = 0.98

_RAW, _ZSTD = 0, 1
_PLANE = struct.Struct("<BI")


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of the original that make one frame; `width` is how many bytes one number has."""

    span: Span
    width: int


def blocks_of(size_bytes: int, table: TensorTable | None) -> Iterator[Block]:
    """How a file is cut into frames: the header, then tensors, so that no frame holds two parts of a model."""
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
        yield Block(Span(at, min(at + FRAME_BYTES, end)), width)


def pack(data: bytes, width: int) -> bytes:
    """One frame."""
    import numpy as np
    import zstandard

    if width == 1 or len(data) % width:
        planes = [data]
    else:
        numbers = np.frombuffer(data, np.uint8).reshape(-1, width)
        planes = [numbers[:, plane].tobytes() for plane in range(width)]
    squeezer = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False, write_checksum=False)
    head, bodies = bytearray([len(planes)]), []
    for plane in planes:
        small = squeezer.compress(plane)
        is_worth = len(small) < WORTH * len(plane)
        bodies.append(small if is_worth else plane)
        head += _PLANE.pack(_ZSTD if is_worth else _RAW, len(bodies[-1]))
    return bytes(head) + b"".join(bodies)


def unpack(frame: bytes, size_bytes: int) -> bytes:
    """The bytes that the frame was made of, of which there are `size_bytes`. WrongBytes where it is no such frame."""
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
        raise WrongBytes("a packed frame has a bad head")
    each, at = size_bytes // count, 1 + count * _PLANE.size
    squeezed: Any = zstandard.ZstdDecompressor()
    for number in range(count):
        kind, length = _PLANE.unpack_from(frame, 1 + number * _PLANE.size)
        body = frame[at : at + length]
        at += length
        try:
            plane = squeezed.decompress(body, max_output_size=each) if kind == _ZSTD else body
        except zstandard.ZstdError as error:
            raise WrongBytes(f"a packed frame does not unpack: {error}") from error
        if len(plane) != each:
            raise WrongBytes(f"a plane of a packed frame has {len(plane)} bytes instead of {each}")
        yield plane
    if at != len(frame):
        raise WrongBytes("a packed frame has bytes left over")


def covering(frames: Iterable[Span], wanted: Iterable[Span]) -> list[int]:
    """The numbers of the frames that hold any of the wanted bytes. Both in order and without overlaps."""
    spans, found = [span for span in wanted if len(span)], []
    at = 0
    for number, frame in enumerate(frames):
        while at < len(spans) and spans[at].end <= frame.begin:
            at += 1
        if at < len(spans) and spans[at].begin < frame.end:
            found.append(number)
    return found
