"""Which errors mean out of memory: a GPU's, or the machine's own."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Texts of errors that torch has no class for: from libraries below it, and about the machine's memory.
_OOM_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory")


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
