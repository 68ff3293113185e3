"""Which model failed. Errors inside `blames` name it, and what strangers' files make libraries raise becomes ours.

Loads no torch.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from fanlight.errors import FailedPrecondition, FanlightError, InvalidField, NodeFault
from services.diffusion.models.entries import KINDS, CheckpointEntry, Entry
from services.diffusion.models.recipes import UnfitFolder
from services.kernel.logs import get_logger

log = get_logger()

# What reading or running a model raises whose file is damaged, or holds other types, sizes or depths than any model.
# Not a tuple of libraries' own classes: those are translated where the library is called.
CONTENT_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, StopIteration, TypeError, UnfitFolder, ValueError, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
_DEVICE_NAME_LIMIT = 64
# How much of a cause is logged.
CAUSE_LIMIT = 500


class MissingFile(FileNotFoundError):
    """The folder never had the file that a model needs."""


_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class UnusableModel(FailedPrecondition):
    """A model is damaged, of an unsupported form, or fits nothing that it is used with; `part` names it.

    Trying again here gives the same error; another node may have a sound file, and is asked before the task ends.
    """

    reason = "BAD_WEIGHTS"
    is_request_fault = True


def part_of(entry: Entry) -> str:
    """As failures name it, such as `lora:cyanotype`."""
    return f"{KINDS[type(entry)]}:{entry.id}"


def part_of_device(name: str) -> str:
    """Such as `device:cuda:NVIDIA_H200`: without blanks, and as short as the gateway takes it."""
    return f"device:{re.sub(r'[^!-~]+', '_', name)[:_DEVICE_NAME_LIMIT] or 'unknown'}"


@contextmanager
def blames(entry: Entry) -> Iterator[None]:
    """Errors inside name this model, unless they name another part, or are about the request's own values.

    Errors of libraries become UnusableModel or NodeFault; those of the device stay as they are.
    """
    try:
        yield
    except InvalidField:
        raise
    except FanlightError as error:
        error.of_part(part_of(entry))
        raise
    except CONTENT_ERRORS as error:
        if is_of_device(error):
            raise
        raise fault_of(entry, error) from error


def fault_of(entry: Entry, cause: Exception) -> FanlightError:
    """What a library raised while the model was used. Of a checkpoint, the node itself may be the reason."""
    name = f"{KINDS[type(entry)]} {entry.id}"
    error = damaged(name, cause, f"{name} cannot be used: a file is damaged, or of another model")
    if isinstance(entry, CheckpointEntry):
        error = NodeFault(f"{name} cannot be used here: a file is damaged, or this node cannot run it")
    return error.of_part(part_of(entry))


def damaged(name: str, cause: Exception, message: str) -> FanlightError:
    """UnusableModel, or NodeFault where the disk fails, which another attempt may find well.

    A file that was removed, or may no longer be read, is the model's: another attempt finds the same.

    A cause may name paths, so it is only logged.
    """
    log.warning("load_failed", model=name, cause=repr(cause)[:CAUSE_LIMIT])
    if isinstance(cause, OSError) and not isinstance(cause, _GONE):
        return NodeFault(message)
    return UnusableModel(message)


def is_of_device(error: BaseException) -> bool:
    """The device is out of memory or lost, which says nothing about a model."""
    # Torch is loaded by whoever works on a device.
    import torch

    from services.diffusion.models.device import DeviceOutOfMemory, is_out_of_memory

    return isinstance(error, torch.AcceleratorError | DeviceOutOfMemory) or is_out_of_memory(error)
