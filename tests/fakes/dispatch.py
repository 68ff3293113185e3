"""Counts what a piece of work asks of torch: operations, and reads of tensors that wait for a device."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host needs, so that it waits for the device: of their inputs, or of their result's shape.
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")


class DispatchCount(TorchDispatchMode):
    """Counts in this thread, views and copies too. What the host draws or makes itself is counted, but no sync."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.syncs: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        self.names[name] += 1
        if any(name.startswith(read) for read in _READS) or _has_mask(name, args):
            self.syncs[name] += 1
        return func(*args, **dict(kwargs or {}))


def _has_mask(name: str, args: Sequence[Any]) -> bool:
    """Indexing by booleans counts them first."""
    indices = args[1] if name == "index" and len(args) > 1 else []
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
