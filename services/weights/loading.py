"""From held files to tensors: headers checked first, pages read ahead, no second copy in memory. torch only on use.

Pickles are loaded only where the catalog pins their sha256 or the operator allows them, and never run code.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanlight.errors import FailedPrecondition
from services.weights.references.manifest import TensorEntry
from services.weights.references.tensors import BadHeader, read_table, sha256_of

WILLNEED, HUGEPAGE, POPULATE_READ = 3, 14, 22
# So much at a time that the threads seldom have to wait for the interpreter between two of them.
STEP_BYTES = 16 * 1024 * 1024
READERS = 8
HUGE_BYTES = 2 * 1024 * 1024
# The kernel silently cuts what one WILLNEED asks for to the disk's largest request, or its read-ahead.
WILLNEED_BYTES = 128 * 1024


@cache
def _madvise() -> Any:
    """The C library's; None where the numbers above may mean something else."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def read_ahead(mapped: mmap.mmap, begin: int, end: int) -> list[threading.Thread]:
    """Have these bytes read by threads of their own, from the front on; they keep the mapping alive until they end.

    Several, as a disk is quick only with several requests before it, and each waits for its own.
    """
    if _madvise() is None or begin >= end:
        return []
    start = begin - begin % HUGE_BYTES
    anchor = ctypes.c_char.from_buffer(mapped, start)
    # A fault then reads 4 MiB, whatever the disk's own read-ahead is; systems that cannot do that go on in small pages.
    _madvise()(ctypes.addressof(anchor), end - start, HUGEPAGE)
    steps = iter(range(0, end - start, STEP_BYTES))
    count = min(READERS, -(-(end - start) // STEP_BYTES))
    threads = [
        threading.Thread(target=_read, args=(anchor, end - start, steps), name="read-ahead", daemon=True)
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads


def _read(anchor: ctypes.c_char, length: int, steps: Iterator[int]) -> None:
    """Map one step after the other of those that all readers share; ask for them where the kernel maps none."""
    address, call = ctypes.addressof(anchor), _madvise()
    # A range's iterator gives each step to one thread only.
    for at in steps:
        size = min(STEP_BYTES, length - at)
        if call(address + at, size, POPULATE_READ):
            for part in range(at, at + size, WILLNEED_BYTES):
                call(address + part, min(WILLNEED_BYTES, length - part), WILLNEED)


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
