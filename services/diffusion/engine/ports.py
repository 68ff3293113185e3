"""What the engine needs from a backend that works on the device, and what it returns. Loads no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fanlight.errors import NodeFault
from services.diffusion.engine.generation import Generation
from services.diffusion.images import Pixels
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.kernel.config import ProcessEnd


class DeviceLost(NodeFault, ProcessEnd):
    """The device failed so that only a new process can use it, as a GPU's context does after a bad access."""

    reason = "DEVICE_LOST"
    # EX_TEMPFAIL of sysexits.h: start it again.
    exit_code = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgress:
    """Counts evaluations of the model. `preview` is a PNG; empty where none is due."""

    step: int
    steps: int
    preview: bytes = field(default=b"", repr=False)


Report = Callable[[StepProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceResult:
    """`nsfw`: None where no check was requested; `device` and `dtype` as torch names them."""

    pixels: Pixels
    nsfw: bool | None = None
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedResult(DeviceResult):
    # Name and seconds of each span of the work.
    spans: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one evaluation did for one image."""

    progress: StepProgress
    is_finished: bool
    # What went wrong with this image alone.
    error: Exception | None = None


# One image's state on the device; only its backend knows what it is.
RequestState = object


class Backend(Protocol):
    """Does the work; every call is made on the device thread."""

    def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry]) -> None:
        """Load models into memory; those that are cached cost nothing."""
        ...

    def begin(self, generation: Generation) -> RequestState:
        """Prepare all that the first evaluation needs: noise, conditioning, scheduler."""
        ...

    def advance(self, states: Sequence[RequestState]) -> Sequence[StepResult]:
        """One evaluation for images of one BatchKey, in order."""
        ...

    def finish(self, state: RequestState) -> DeviceResult:
        """Decode the finished latents."""
        ...
