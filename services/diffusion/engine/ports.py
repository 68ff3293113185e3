"""What the engine asks of those that do the work on the device, and what it gives back. Loads no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fanlight.errors import NodeFault
from services.diffusion.generation import Generation
from services.diffusion.models.entries import CheckpointEntry, ControlNetEntry
from services.diffusion.pictures.png import Pixels


class DeviceLost(NodeFault):
    """The device failed in a way that only another process gets over, as a GPU's context does after a bad access."""

    reason = "DEVICE_LOST"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Counts evaluations of the model. `preview` is a PNG; empty where none is due."""

    step: int
    steps: int
    preview: bytes = field(default=b"", repr=False)


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What the device made. `nsfw`: None where nobody asked; `device` and `dtype` as torch calls them."""

    pixels: Pixels
    nsfw: bool | None = None
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Painting(Finished):
    # Name and seconds of each stretch of the work.
    spans: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """What one evaluation did for one picture."""

    progress: Progress
    is_finished: bool
    # What went wrong with this picture alone.
    error: Exception | None = None


# A picture in the making, on the device; only its studio knows what it is.
Canvas = object


class Studio(Protocol):
    """Does the work; every call is made on the device thread."""

    def load(self, checkpoint: CheckpointEntry, controlnets: Sequence[ControlNetEntry]) -> None:
        """Bring models into memory; those that are there already cost nothing."""
        ...

    def begin(self, generation: Generation) -> Canvas:
        """Noise, embeddings, scheduler: all that the first evaluation needs."""
        ...

    def advance(self, canvases: Sequence[Canvas]) -> Sequence[Advance]:
        """One evaluation for pictures of one BatchKey, in order."""
        ...

    def finish(self, canvas: Canvas) -> Finished: ...
