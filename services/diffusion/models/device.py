"""The device that models run on: what is particular to it is here and nowhere else."""

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from fanlight.errors import NodeFault
from services.diffusion.models.shadow import doubled
from services.diffusion.models.shortage import is_shortage

# Of the memory that is there, what models may fill when no setting says otherwise; the rest is for the work itself.
_RAM_SHARE, _VRAM_SHARE, _FREE_SHARE = 0.6, 0.85, 0.9


class Device(Protocol):
    torch_device: torch.device
    # Such as `cpu` or `cuda:NVIDIA GeForce RTX 3060`.
    name: str
    dtype: torch.dtype
    # Its memory is the machine's own: what is in RAM is on the device.
    is_host: bool

    def memory_bytes(self) -> int:
        """What models may fill of its own memory."""
        ...

    def kept(self, module: Any) -> Any:
        """The module in RAM, where this device reaches it quickly."""
        ...

    def uploaded(self, module: Any) -> Any:
        """The module on the device; the one in RAM stays as it is."""
        ...

    def freed(self) -> None:
        """Things on the device were dropped."""
        ...


class CpuDevice:
    torch_device = torch.device("cpu")
    name = "cpu"
    dtype = torch.float32
    is_host = True

    def memory_bytes(self) -> int:
        return ram_bytes()

    def kept(self, module: Any) -> Any:
        return module

    def uploaded(self, module: Any) -> Any:
        return module

    def freed(self) -> None:
        pass


class CudaDevice:
    dtype = torch.float16
    is_host = False

    def __init__(self, device: torch.device) -> None:
        # Without it sums in cuBLAS come in another order every time; it is read when the first is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.torch_device = device
        self.name = f"cuda:{torch.cuda.get_device_name(device)}"
        free_bytes, whole_bytes = torch.cuda.mem_get_info(device)
        # Asked once: later, what is free depends on what was loaded. Others' windows and models may fill a part.
        self._memory_bytes = int(min(whole_bytes * _VRAM_SHARE, free_bytes * _FREE_SHARE))

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def kept(self, module: Any) -> Any:
        """Pinned, so that copies run at the link's full rate and beside other work."""
        return doubled(module, lambda name, tensor: _pinned(tensor))

    def uploaded(self, module: Any) -> Any:
        uploaded = doubled(module, lambda name, tensor: tensor.to(self.torch_device, non_blocking=True))
        # Pageable tensors must not go before they are copied.
        torch.cuda.synchronize(self.torch_device)
        return uploaded

    def freed(self) -> None:
        """The allocator keeps what it got; the driver needs it back for larger pieces."""
        torch.cuda.empty_cache()


def open_device(wanted: str) -> Device:
    """`wanted`: `auto`, `cpu`, `cuda` or `cuda:N`. NodeFault where there is none such."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not has_cuda):
        return CpuDevice()
    device = torch.device("cuda" if wanted == "auto" else wanted)
    if not has_cuda or (device.index or 0) >= torch.cuda.device_count():
        raise NodeFault(f"torch finds no device {wanted}")
    return CudaDevice(device)


def ram_bytes() -> int:
    """What models may fill of the machine's memory, or of what its container may have."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file) as opened:
                whole = min(whole, int(opened.read()))
        except (OSError, ValueError):
            continue
    return int(whole * _RAM_SHARE)


def _pinned(tensor: Tensor) -> Tensor:
    """As it is where the machine has no more memory to pin."""
    try:
        return tensor if tensor.is_pinned() else tensor.pin_memory()
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        return tensor
