"""A device's memory, played on the CPU: counts what torch keeps alive, and runs out of it where a test says so."""

import random
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class FakeMemory(TorchDispatchMode):
    """Inside, every tensor that is made counts until it is gone; also after this was left and entered again."""

    def __init__(self, limit_bytes: int = 1 << 60, *, chance: float = 0.0, seed: int = 0) -> None:
        """`chance`: of failing in any operation, whatever is free."""
        super().__init__()
        self.limit_bytes = limit_bytes
        self.chance = chance
        self.used_bytes = self.most_bytes = self.shortages = 0
        self._random = random.Random(seed)
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.chance and self._random.random() < self.chance:
            self._refuse()
        made = func(*args, **(kwargs or {}))
        for each in tree_flatten(made)[0]:
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        if self.used_bytes > self.limit_bytes:
            del made, each
            self._refuse()
        return made

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.used_bytes += storage.nbytes()
            self.most_bytes = max(self.most_bytes, self.used_bytes)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.used_bytes -= self._sizes.pop(key)

    def _refuse(self) -> None:
        self.shortages += 1
        raise torch.OutOfMemoryError("CUDA out of memory (played)")
