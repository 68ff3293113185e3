"""The same bits from the same device every time, for pictures that ask for it. For the device thread."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bits_repeat(wanted: bool) -> Iterator[None]:
    """Inside, torch takes no kernel whose sums come in another order every time, where it has another."""
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    # As use_deterministic_algorithms, which also imports torch's compiler, in seconds, and all that it drags in.
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")
        cudnn.deterministic, cudnn.benchmark = before
