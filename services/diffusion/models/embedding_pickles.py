"""Textual inversions that were saved as pickles: which tensors are in one, and their values.

The pickle is read with a table of its own in place of the names that it imports: nothing is imported and nothing of it
runs. The table has what such files name, after A1111's (modules/safe.py). Loads torch only for values.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from services.diffusion.models.embedding_files import EMBEDDING_LIMIT_BYTES, Shape, too_large
from services.diffusion.models.recipes import UnfitFolder
from services.kernel.files import open_ordinary

if TYPE_CHECKING:
    from torch import Tensor

# Of what torch.save writes beside the tensors' values.
_STRUCTURE_LIMIT_BYTES = 1024 * 1024
_ZIP = b"PK\x03\x04"
# torch.save's before version 1.6: four pickles, the last the object; then the storages.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ByteStorage": ("uint8", 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Storage:
    key: str
    dtype: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledTensor:
    """`offset` and `stride` count elements, as in torch."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


def pickled_shapes(path: Path) -> Mapping[str, Shape]:
    """The tensors' shapes by name, without reading their values. UnfitFolder says why it is no textual inversion."""
    with _opened(path) as file:
        found, _ = _read(file)
    return {name: tensor.shape for name, tensor in found.items()}


def pickled_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors by name, such as (N, D), in the file's types and unscaled. UnfitFolder."""
    import torch

    with _opened(path) as file:
        found, storage_of = _read(file)
        tensors = {}
        for name, each in found.items():
            flat = torch.frombuffer(bytearray(storage_of(each.storage)), dtype=getattr(torch, each.storage.dtype))
            tensors[name] = flat.as_strided(each.shape, each.stride, each.offset).clone()
    return tensors


def _opened(path: Path) -> BinaryIO:
    """OSError, StrangeFile; UnfitFolder for a large one, of which nothing is read."""
    file = open_ordinary(path)
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    if size_bytes > EMBEDDING_LIMIT_BYTES:
        file.close()
        raise UnfitFolder(too_large(size_bytes))
    return file


# From a storage to its bytes.
_Bytes = Callable[[_Storage], bytes]


def _read(file: BinaryIO) -> tuple[Mapping[str, PickledTensor], _Bytes]:
    is_zip = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    try:
        content, storage_of = _read_zip(file) if is_zip else _read_legacy(file)
    except UnfitFolder:
        raise
    except _PICKLE_ERRORS as error:
        raise UnfitFolder(f"it cannot be read as a pickle of tensors ({type(error).__name__})") from error
    return _tensors(content), storage_of


_PICKLE_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError,
    NotImplementedError, OSError, RecursionError, TypeError, ValueError, struct.error,
)  # fmt: skip


def _read_zip(file: BinaryIO) -> tuple[object, _Bytes]:
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UnfitFolder("it is an archive, but none that torch.save writes")
    prefix = names[0].removesuffix("data.pkl")

    def member(name: str, limit_bytes: int) -> bytes:
        if archive.getinfo(name).file_size > limit_bytes:
            raise UnfitFolder(f"{name[-40:]} in it is larger than in any textual inversion")
        return archive.read(name)

    if f"{prefix}byteorder" in archive.namelist() and member(f"{prefix}byteorder", 16) != b"little":
        raise UnfitFolder("it was written on a machine of another byte order")
    content = _Reader(io.BytesIO(member(names[0], _STRUCTURE_LIMIT_BYTES))).load()
    return content, lambda storage: member(f"{prefix}data/{storage.key}", EMBEDDING_LIMIT_BYTES)


def _read_legacy(file: BinaryIO) -> tuple[object, _Bytes]:
    if _Reader(file).load() != _LEGACY_MAGIC:
        raise UnfitFolder("it is a pickle, but none that torch.save writes")
    for _ in ("version", "of the machine"):
        _Reader(file).load()
    reader = _Reader(file)
    content = reader.load()

    def storage_of(wanted: _Storage) -> bytes:
        file.seek(start)
        for key in _Reader(file).load():
            numbers = int.from_bytes(file.read(8), "little")
            data = file.read(reader.storages[key].size_bytes)
            if key == wanted.key and len(data) == wanted.size_bytes and numbers:
                return data
        raise UnfitFolder("it ends before its tensors do")

    start = file.tell()
    return content, storage_of


class _Opaque:
    """In place of whatever is no tensor."""

    def __init__(self, *values: object, **named: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """What it puts in place of names is made for each file: a pickle can set attributes of what it imports."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}
        opaque = type("Opaque", (_Opaque,), {})

        def first(value: object, *others: object) -> object:
            return value

        def tensor(*values: Any) -> PickledTensor:
            return _tensor(*values[:4])

        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): first,
            ("torch._utils", "_rebuild_parameter_with_state"): first,
            ("torch.nn.modules.container", "ParameterDict"): opaque,
            ("_codecs", "encode"): lambda *values: b"",
            ("torch", "Size"): first,
            **dict.fromkeys([("torch", "device"), ("torch.serialization", "_get_layout")], opaque),
            **dict.fromkeys([("builtins", "set"), ("__builtin__", "set")], set),
            **dict.fromkeys([("torch", each) for each in ("float32", "float16", "bfloat16", "float64")], opaque),
            **dict.fromkeys([("numpy", each) for each in ("dtype", "ndarray")], opaque),
            **{
                (module, name): opaque
                for module in ("numpy.core.multiarray", "numpy._core.multiarray")
                for name in ("scalar", "_reconstruct")
            },
            ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): opaque,
            ("argparse", "Namespace"): opaque,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in _DTYPES:
            return name
        if module.startswith("numpy") and module.split(".")[-1] == "dtypes":
            return self._known["numpy", "dtype"]
        if (module, name) not in self._known:
            raise UnfitFolder(f"its pickle names {module[:40]}.{name[:40]}, as no textual inversion does")
        return self._known[module, name]

    def persistent_load(self, saved: Any) -> Any:
        """`saved`: ("storage", its class, its key, where it was, how many numbers), as torch.save writes it.

        Old files have ("module", a class, its source code) too, of which the class counts.
        """
        if saved[0] == "module":
            return saved[1]
        mark, kind, key, _, numbers = saved[:5]
        dtype, size_bytes = _DTYPES[kind]
        if mark != "storage" or type(numbers) is not int or not 0 <= numbers <= EMBEDDING_LIMIT_BYTES:
            raise ValueError("no storage of a textual inversion")
        storage = _Storage(key=str(key), dtype=dtype, size_bytes=numbers * size_bytes)
        return self.storages.setdefault(storage.key, storage)


def _tensor(storage: object, offset: object, shape: object, stride: object) -> PickledTensor:
    """ValueError for what torch cannot build, or would build in more memory than any textual inversion takes."""
    numbers = [offset, *_whole_numbers(shape), *_whole_numbers(stride)]
    if not isinstance(storage, _Storage) or any(type(each) is not int or each < 0 for each in numbers):
        raise ValueError("no tensor")
    shape, stride = _whole_numbers(shape), _whole_numbers(stride)
    if len(shape) != len(stride) or prod(shape) > EMBEDDING_LIMIT_BYTES:
        raise ValueError("no tensor of a textual inversion")
    assert isinstance(offset, int)
    return PickledTensor(storage=storage, offset=offset, shape=shape, stride=stride)


def _whole_numbers(value: object) -> Shape:
    if not isinstance(value, tuple | list) or len(value) > 8:
        raise ValueError("no sizes of a tensor")
    return tuple(value)


def _tensors(content: object) -> Mapping[str, PickledTensor]:
    """By name: A1111's `string_to_param`, perhaps a ParameterDict; a token and its vectors; SDXL's pairs; a tensor."""
    if isinstance(content, PickledTensor):
        return {"": content}
    found = _mapping(content)
    if "string_to_param" in found:
        found = _mapping(found["string_to_param"])
    tensors = {str(name): value for name, value in found.items() if isinstance(value, PickledTensor)}
    if not tensors:
        raise UnfitFolder("it has no tensors that could be a textual inversion's")
    return tensors


def _mapping(value: object) -> Mapping[Any, object]:
    """A dictionary, or what a ParameterDict has saved; empty for anything else."""
    if isinstance(value, _Opaque) and isinstance(value.state, dict):
        value = value.state.get("_parameters")
    return value if isinstance(value, dict) else {}
