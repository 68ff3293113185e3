"""Headers of safetensors files: names, shapes, metadata, and the few small tensors that say something. No torch."""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.unknown_files import other_content
from services.kernel.files import StrangeFile, open_ordinary
from services.weights.references.manifest import TensorEntry, TensorTable
from services.weights.references.tensors import LENGTH_BYTES, BadHeader, header_length, parse_header

_METADATA = '"__metadata__"'
# Of a tensor that is read at the start: a layer's norm, a list of means.
NUMBERS_LIMIT = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """Tensors' shapes by name, and the file's metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    # What it was read from: a file, or the files of a folder of parts.
    tables: Sequence[tuple[Path, TensorTable]] = ()

    def width(self, ending: str) -> int:
        """The last dimension of a tensor whose name ends so; 0 where there is none."""
        return next((shape[-1] for name, shape in self.shapes.items() if name.endswith(ending) and shape), 0)

    def dtypes(self) -> Mapping[str, str]:
        """By tensor's name, as the file spells it: `F16`, `F8_E4M3`."""
        return {tensor.name: tensor.dtype for _, table in self.tables for tensor in table.tensors}

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """The numbers of a small tensor, perhaps not finite. None where there is none, or it is large or no float."""
        for path, table in self.tables:
            found = next((tensor for tensor in table.tensors if tensor.name == name), None)
            if found is not None:
                return _numbers(path, found)
        return None


def read_header(path: Path) -> SafetensorsHeader:
    """Of one file, or of all in a folder of parts. UnfitFolder where one is not a valid safetensors file."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    tables = []
    for file in files:
        table, own = _read(file)
        tables.append((file, table))
        shapes.update({tensor.name: tensor.shape for tensor in table.tensors})
        metadata.update(own)
    return SafetensorsHeader(shapes=shapes, metadata=metadata, tables=tables)


def _read(file: Path) -> tuple[TensorTable, Mapping[str, str]]:
    first = b""
    try:
        with open_ordinary(file) as opened:
            first = opened.read(LENGTH_BYTES)
            header = opened.read(header_length(first))
        table = parse_header(first, header, size_bytes=file.stat().st_size)
    except OSError as error:
        raise UnfitFolder(f"{file.name} cannot be read: {error.strerror or type(error).__name__}") from error
    except (StrangeFile, BadHeader) as error:
        raise UnfitFolder(f"{file.name} {other_content(first) or f'is damaged: {error}'}") from error
    return table, _metadata(header.decode())


def told_by_first_bytes(file: Path) -> str:
    """As `other_content`; empty for what only loading it can tell."""
    try:
        with open_ordinary(file) as opened:
            return other_content(opened.read(LENGTH_BYTES))
    except (OSError, StrangeFile):
        return ""


def _metadata(header: str) -> Mapping[str, str]:
    """Of a header that was parsed before: the object behind the one key of that name, for a second time."""
    _, found, rest = header.partition(_METADATA)
    if not found:
        return {}
    metadata, _ = json.JSONDecoder().raw_decode(rest.lstrip(" \t\r\n:"))
    return metadata if isinstance(metadata, dict) else {}


def _numbers(path: Path, tensor: TensorEntry) -> tuple[float, ...] | None:
    decode = _DECODERS.get(tensor.dtype)
    if decode is None or math.prod(tensor.shape) > NUMBERS_LIMIT:
        return None
    try:
        with open_ordinary(path) as opened:
            opened.seek(tensor.begin)
            return decode(opened.read(tensor.size_bytes))
    except (OSError, StrangeFile, struct.error) as error:
        raise UnfitFolder(f"{path.name} is damaged: {tensor.name[:80]} cannot be read") from error


def _unpacked(code: str) -> Callable[[bytes], tuple[float, ...]]:
    return lambda data: struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)


def _widened(data: bytes, *, code: str, zeros: int) -> tuple[float, ...]:
    """Types that are the upper bytes of a wider one."""
    size = struct.calcsize(code) - zeros
    wide = b"".join(bytes(zeros) + data[at : at + size] for at in range(0, len(data), size))
    return _unpacked(code)(wide)


def _e4m3(byte: int) -> float:
    """Of the kind without infinities, as files of models have it."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 0xF, byte & 0x7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


_DECODERS: Mapping[str, Callable[[bytes], tuple[float, ...]]] = {
    "F64": _unpacked("d"),
    "F32": _unpacked("f"),
    "F16": _unpacked("e"),
    "BF16": lambda data: _widened(data, code="f", zeros=2),
    "F8_E5M2": lambda data: _widened(data, code="e", zeros=1),
    "F8_E4M3": lambda data: tuple(map(_e4m3, data)),
}
