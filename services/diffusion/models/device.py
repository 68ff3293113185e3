"""The device that models run on, copies of modules for it, and which errors mean out of memory.

What is particular to a device is only here.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fanlight.errors import NodeFault
from fanlight.machine import this_machine
from services.diffusion.models.precision import AUTO, precision_of_card

# The part of the memory that models may fill when no setting says otherwise; the rest is for the work itself.
_RAM_SHARE, _VRAM_SHARE, _FREE_SHARE = 0.6, 0.85, 0.9
# Texts of errors that torch has no class for: from libraries below it, and about the machine's memory.
_OOM_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory")


class TorchDevice(Protocol):
    """Where models run."""

    torch_device: torch.device
    # Such as `cpu` or `cuda:NVIDIA GeForce RTX 3060`.
    name: str
    dtype: torch.dtype
    # Its memory is the machine's own: what is in RAM is on the device.
    is_host: bool

    def memory_bytes(self) -> int:
        """What models may fill of its own memory."""
        ...

    def pin_in_ram(self, module: Any) -> Any:
        """The module in RAM from which the device can copy it quickly."""
        ...

    def upload(self, module: Any) -> Any:
        """The module on the device; the one in RAM stays as it is."""
        ...

    def after_eviction(self) -> None:
        """Called when things on the device were evicted."""
        ...


class CpuDevice:
    torch_device = torch.device("cpu")
    name = "cpu"
    dtype = torch.float32
    is_host = True

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or self.dtype

    def memory_bytes(self) -> int:
        return ram_bytes()

    def pin_in_ram(self, module: Any) -> Any:
        return module

    def upload(self, module: Any) -> Any:
        return module

    def after_eviction(self) -> None:
        pass


class CudaDevice:
    # Of a card that says nothing else.
    dtype = torch.float16
    is_host = False

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """`dtype`: None chooses by the card."""
        # Without it cuBLAS sums in a different order every time; it is read at the first sum.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.torch_device = device
        card = torch.cuda.get_device_name(device)
        self.name = f"cuda:{card}"
        self.dtype = dtype or _dtype_of(precision_of_card(card, torch.cuda.get_device_capability(device)))
        free_bytes, whole_bytes = torch.cuda.mem_get_info(device)
        # Measured once: later, what is free depends on what was loaded. Other programs may fill a part.
        self._memory_bytes = int(min(whole_bytes * _VRAM_SHARE, free_bytes * _FREE_SHARE))

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def pin_in_ram(self, module: Any) -> Any:
        """In pinned memory, so that copies run at the link's full rate and beside other work."""
        return shallow_copy_module(module, lambda name, tensor: _pinned(tensor))

    def upload(self, module: Any) -> Any:
        uploaded = shallow_copy_module(module, lambda name, tensor: tensor.to(self.torch_device, non_blocking=True))
        # Pageable tensors must live until they are copied.
        torch.cuda.synchronize(self.torch_device)
        return uploaded

    def after_eviction(self) -> None:
        """The allocator caches what it got; the driver needs it back for larger pieces."""
        torch.cuda.empty_cache()


def open_device(name: str, *, precision: str = AUTO) -> TorchDevice:
    """`name`: `auto`, `cpu`, `cuda` or `cuda:N`. `precision`: `auto`, or as torch names it. NodeFault where there is no
    such device.
    """
    has_cuda = torch.cuda.is_available()
    dtype = None if precision == AUTO else _dtype_of(precision)
    if name == "cpu" or (name == "auto" and not has_cuda):
        return CpuDevice(dtype)
    device = torch.device("cuda" if name == "auto" else name)
    if not has_cuda or (device.index or 0) >= torch.cuda.device_count():
        raise NodeFault(f"torch finds no device {name}")
    return CudaDevice(device, dtype)


def _dtype_of(precision: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def ram_bytes() -> int:
    """What models may fill of the machine's memory, or of its container's limit."""
    return int(this_machine().memory_bytes * _RAM_SHARE)


def _pinned(tensor: Tensor) -> Tensor:
    """Not pinned where the machine has no more memory to pin; any shape and type."""
    try:
        return tensor if tensor.is_pinned() else tensor.pin_memory()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return tensor


# From a tensor and its full name to the tensor that replaces it.
Replace = Callable[[str, Tensor], Tensor]
# The dicts in which a module keeps its members.
_OWN = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def shallow_copy_module(module: Any, replace: Replace, prefix: str = "") -> Any:
    """Its own tree of modules over the same tensors, some of them replaced; the original stays as it is."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for name in _OWN:
        copy.__dict__[name] = module.__dict__[name].copy()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            replaced = replace(prefix + name, parameter)
            is_same = replaced is parameter
            copy._parameters[name] = parameter if is_same else nn.Parameter(replaced, requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            copy._buffers[name] = replace(prefix + name, buffer)
    for name, child in module._modules.items():
        if child is not None:
            copy._modules[name] = shallow_copy_module(child, replace, f"{prefix}{name}.")
    return copy


def module_bytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class DeviceOutOfMemory(Exception):
    """There was no memory for what was tried. Its catcher knows what else to try."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OOM_TEXTS)


@contextmanager
def translate_oom() -> Iterator[None]:
    """Raise DeviceOutOfMemory for every error that means it; what the failed work referred to is released first."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise DeviceOutOfMemory(str(error)) from error
