"""A device with a memory of its own, for machines without one: its copies lie in RAM, and it counts them."""

from typing import Any

import torch

from services.diffusion.models.device import shallow_copy_module


class FakeGpu:
    torch_device = torch.device("cpu")
    name = "cuda:Fake"
    dtype = torch.float32
    is_host = False

    def __init__(self, *, memory_bytes: int = 1 << 30) -> None:
        self._memory_bytes = memory_bytes
        self.uploads = 0
        self.frees = 0

    def memory_bytes(self) -> int:
        return self._memory_bytes

    def pin_in_ram(self, module: Any) -> Any:
        return module

    def upload(self, module: Any) -> Any:
        self.uploads += 1
        return shallow_copy_module(module, lambda name, tensor: tensor.clone())

    def after_eviction(self) -> None:
        self.frees += 1
