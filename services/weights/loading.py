"""From held files to tensors: headers checked first, pages read ahead, no second copy in memory. torch only on use.

Pickles are loaded only where the catalog pins their sha256 or the operator allows them, and never run code.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanlight.errors import FailedPrecondition
from services.weights.files import read_table, sha256_of
from services.weights.manifest import TensorEntry
from services.weights.readahead import read_ahead
from services.weights.tensors import BadHeader

if TYPE_CHECKING:
    import torch


def load_safetensors(path: Path, *, prefixes: tuple[str, ...] = ("",)) -> dict[str, "torch.Tensor"]:
    """The tensors whose names begin so, as views of one private mapping: writing to them changes no file. BadHeader.

    Returns at once; threads read the file into memory meanwhile. Build the module that they go into after this call.
    """
    import torch

    wanted = [tensor for tensor in read_table(path).tensors if tensor.name.startswith(prefixes)]
    if not wanted:
        return {}
    dtypes = _dtypes(torch)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    read_ahead(mapped, wanted[0].begin, wanted[-1].end)
    return {t.name: _view(torch, mapped, t, dtypes) for t in wanted}


def load_checkpoint(path: Path, *, prefixes: tuple[str, ...] = ("",)) -> dict[str, "torch.Tensor"]:
    """A checkpoint as a store shows it: one file, or the folder of its parts; the tensors under their own names.

    `prefixes`: only those whose names begin so.
    """
    if path.is_file():
        return load_safetensors(path, prefixes=prefixes)
    parts = sorted(path.glob("*.safetensors"))
    if not parts:
        raise FailedPrecondition(f"{path} holds no safetensors")
    return {name: tensor for part in parts for name, tensor in load_safetensors(part, prefixes=prefixes).items()}


def load_pickle(path: Path, *, pinned: frozenset[str], allow: bool = False) -> Mapping[str, Any]:
    """What a pickle of weights holds, loaded with `weights_only=True`. FailedPrecondition where it is not allowed."""
    if not allow and sha256_of(path) not in pinned:
        raise FailedPrecondition(f"{path.name} is a pickle that no catalog entry pins by its sha256")
    import torch

    loaded: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    return loaded


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _dtypes(torch: Any) -> dict[str, Any]:
    names = {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
    }
    return {name: getattr(torch, attribute) for name, attribute in names.items() if hasattr(torch, attribute)}


def _view(torch: Any, mapped: mmap.mmap, entry: TensorEntry, dtypes: Mapping[str, Any]) -> Any:
    if entry.dtype not in dtypes:
        raise BadHeader(f"{entry.name!r} has the dtype {entry.dtype}, which torch cannot hold")
    dtype = dtypes[entry.dtype]
    if not entry.size_bytes:
        return torch.empty(entry.shape, dtype=dtype)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.size_bytes, offset=entry.begin)
    if entry.begin % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)
