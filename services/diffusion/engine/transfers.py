"""Between the host and the device without waiting, by pinned memory that torch keeps a pool of."""

from typing import NamedTuple

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of any shape on the device, without waiting for the device: it is copied behind the work before."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor if tensor.device == device else tensor.to(device)


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Of any shape. Asks nothing of torch where it is of the type already, other than `to`."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


class _Copy(NamedTuple):
    """On its way to the host; here once the event has come. None: it is here."""

    flags: Tensor
    event: torch.cuda.Event | None


class HostFlags:
    """Flags that the device computes in every step, read a step later, so that its next step has begun by then."""

    def __init__(self) -> None:
        self._latest: _Copy | None = None
        self._before: _Copy | None = None

    def post(self, flags: Tensor) -> None:
        """`flags`: booleans (B,), of the step that was just begun."""
        self._before, self._latest = self._latest, _copied(flags)

    def read(self, *, is_last: bool) -> list[bool] | None:
        """Those of the step before the latest; the latest ones if they are on the host, or no step follows.

        None where there was no step before.
        """
        copy = self._latest
        if copy is not None and copy.event is not None and not is_last:
            copy = self._before
        if copy is None:
            return None
        if copy.event is not None:
            copy.event.synchronize()
        flags: list[bool] = copy.flags.numpy().tolist()
        return flags


def _copied(flags: Tensor) -> _Copy:
    if flags.device.type != "cuda":
        return _Copy(flags, None)
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return _Copy(host, event)
