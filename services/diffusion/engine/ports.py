"""What the engine needs from a backend that works on the device, and what it returns. Loads no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.diffusion.engine.generation import Generation
from services.diffusion.images import Pixels
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry


class UnmadePreview(Protocol):
    """A preview that is not made yet."""

    def encode(self) -> bytes:
        """A PNG; empty where none can be made. Takes a while; for any thread but the device's."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgress:
    """Counts evaluations of the model. `preview`: None where none is due."""

    step: int
    steps: int
    preview: UnmadePreview | None = field(default=None, repr=False)


Report = Callable[[StepProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceResult:
    """`nsfw`: None where no check was requested; `device` and the UNet's and VAE's number types as torch names them."""

    pixels: Pixels
    nsfw: bool | None = None
    device: str = ""
    dtype: str = ""
    # What showed on the device only, such as layers of a LoRA that the UNet lacks; sentences.
    warnings: tuple[str, ...] = ()
    vae_dtype: str = ""


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
    # Whether the image is to be begun again, by `begin_again`.
    is_again: bool = False


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

    def begin_again(self, state: RequestState) -> RequestState:
        """Prepare the image again, in a number type of more range."""
        ...

    def finish(self, state: RequestState) -> DeviceResult:
        """Decode the finished latents."""
        ...
