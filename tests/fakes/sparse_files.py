"""Safetensors files of any size that take no disk: a header, and holes for the tensors."""

import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

BYTES = {"F16": 2, "F32": 4, "I64": 8}


def sparse_file(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    *,
    dtype: str = "F16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a file whose tensors of these shapes are zeros."""
    rows: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        end = at + prod(shape) * BYTES[dtype]
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    body = json.dumps(rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(body)) + body)
        file.truncate(8 + len(body) + at)
    return path
