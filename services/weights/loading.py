"""Load tensors from files: header checked first, pages read ahead, no second copy in memory. Imports torch on use.

Pickles are loaded only if the catalog pins their sha256 or the operator allows them, and never run code.
Knows no store.
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
from services.kernel.files import open_ordinary
from services.weights.references.manifest import TensorEntry
from services.weights.references.tensors import BadHeader, read_table, sha256_of

WILLNEED, HUGEPAGE, POPULATE_READ = 3, 14, 22
# Large enough that the threads seldom wait for the interpreter lock between two steps.
STEP_BYTES = 16 * 1024 * 1024
READERS = 8
HUGE_BYTES = 2 * 1024 * 1024
# The kernel silently cuts one WILLNEED to the disk's largest request or its read-ahead.
WILLNEED_BYTES = 128 * 1024


@cache
def _madvise() -> Any:
    """The C library's madvise; None on systems where the constants above may differ."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def read_ahead(mapped: mmap.mmap, begin: int, end: int) -> list[threading.Thread]:
    """Read these bytes into memory on background threads, in order; they keep the mapping alive until they end.

    Several threads, because a disk is fast only with several requests queued. Calls madvise through ctypes: Python's
    own mmap.madvise holds the interpreter lock for as long as the disk takes. Does nothing on systems without it.
    """
    if _madvise() is None or begin >= end:
        return []
    start = begin - begin % HUGE_BYTES
    anchor = ctypes.c_char.from_buffer(mapped, start)
    # With huge pages a fault reads 4 MiB, whatever the disk's read-ahead; other systems use small pages.
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
    """Populate one step after another, shared by all readers; only request them if the kernel cannot populate."""
    address, call = ctypes.addressof(anchor), _madvise()
    # The range iterator hands each step to one thread only.
    for at in steps:
        size = min(STEP_BYTES, length - at)
        if call(address + at, size, POPULATE_READ):
            for part in range(at, at + size, WILLNEED_BYTES):
                call(address + part, min(WILLNEED_BYTES, length - part), WILLNEED)


if TYPE_CHECKING:
    import torch


def load_safetensors(path: Path, *, prefixes: tuple[str, ...] = ("",)) -> dict[str, "torch.Tensor"]:
    """The tensors with these name prefixes: name to tensor. BadHeader.

    Shapes, dtypes and values are the file's: (O, I) for a linear layer, (O, I, KH, KW) for a convolution, unscaled.

    They are views of one private mapping: writing to them does not change the file. Returns at once, while threads read
    the file into memory; build the module that takes them after this call.
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
    """Load a checkpoint from a store: one file, or the folder of its parts.

    Returns the tensors with these name prefixes: name to tensor. Shapes, dtypes and values are the file's: (O, I) for a
    linear layer, (O, I, KH, KW) for a convolution, unscaled.
    """
    if path.is_file():
        return load_safetensors(path, prefixes=prefixes)
    parts = sorted(path.glob("*.safetensors"))
    if not parts:
        raise FailedPrecondition(f"{path} has no safetensors")
    return {name: tensor for part in parts for name, tensor in load_safetensors(part, prefixes=prefixes).items()}


def load_pickle(path: Path, *, pinned: frozenset[str], allow: bool = False) -> Mapping[str, Any]:
    """Load a pickle of weights with `weights_only=True`. FailedPrecondition if it is not allowed, StrangeFile."""
    # Reading a pipe or a device would never end.
    open_ordinary(path).close()
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
        raise BadHeader(f"{entry.name!r} has the dtype {entry.dtype}, which torch does not support")
    dtype = dtypes[entry.dtype]
    if not entry.size_bytes:
        return torch.empty(entry.shape, dtype=dtype)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.size_bytes, offset=entry.begin)
    if entry.begin % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)
