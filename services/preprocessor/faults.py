"""What failed when an annotator did: its weights, its code, the device. Loads no torch."""

import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from fanlight.errors import (
    Cancelled,
    FailedPrecondition,
    FanlightError,
    InvalidField,
    NodeFault,
    ResourceExhausted,
    TooLarge,
)
from services.kernel.logs import get_logger

log = get_logger()

# What reading weights of other types, sizes or depths raises, or running a network that was made from them.
CONTENT_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, StopIteration, TypeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
# How much of a cause is logged.
CAUSE_LIMIT = 500
# About the request or its end, and not about the annotator.
_OF_REQUEST = (InvalidField, TooLarge, Cancelled)
_DEVICE_LOST = "DEVICE_LOST"


class UnusableWeights(FailedPrecondition):
    """The weights of a network are damaged or of another network. Another node may have sound ones."""

    reason = "BAD_WEIGHTS"
    is_request_fault = True


@contextmanager
def reads_weights(name: str) -> Iterator[None]:
    """UnusableWeights for what reading the weights of this network raises; NodeFault where the disk fails."""
    try:
        yield
    except CONTENT_ERRORS as error:
        if is_of_device(error):
            raise
        log.warning("load_failed", model=name, cause=repr(error)[:CAUSE_LIMIT])
        message = f"the weights of {name} cannot be used: a file is missing, damaged or of another network"
        kind = NodeFault if isinstance(error, OSError) else UnusableWeights
        raise kind(message, field="annotator") from error


@contextmanager
def blames(annotator_id: str, device: str) -> Iterator[None]:
    """Errors inside name the annotator, unless they name another part or are about the request's own values.

    `device`: its kind, which a lost device is named by.
    """
    part = f"annotator:{annotator_id}"
    try:
        yield
    except _OF_REQUEST:
        raise
    except FanlightError as error:
        error.of_part(f"device:{device}" if error.reason == _DEVICE_LOST else part)
        raise
    except CONTENT_ERRORS as error:
        if is_out_of_memory(error):
            raise ResourceExhausted(f"no memory for {annotator_id} at this size", field="annotator").of_part(
                part
            ) from error
        if is_of_device(error):
            raise
        log.warning("annotator_failed", annotator=annotator_id, cause=repr(error)[:CAUSE_LIMIT], exc_info=error)
        raise NodeFault(f"the annotator {annotator_id} failed for this image", field="annotator").of_part(
            part
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


def is_of_device(error: BaseException) -> bool:
    """The device is out of memory or lost, which says nothing about weights."""
    torch = sys.modules.get("torch")
    return is_out_of_memory(error) or (torch is not None and isinstance(error, torch.AcceleratorError))
