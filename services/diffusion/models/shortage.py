"""Which errors mean that a memory is full: of a GPU, or the machine's own."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of those that torch has no class of its own for: libraries below it, and the machine's memory.
_SAYS_SO = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory")


class NoRoom(Exception):
    """There was no room for what was tried. Whoever catches it knows what else to try."""


def is_shortage(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAYS_SO)


@contextmanager
def noticed() -> Iterator[None]:
    """NoRoom for whatever means it; what the failed work had in its hands is let go first."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise NoRoom(str(error)) from error
