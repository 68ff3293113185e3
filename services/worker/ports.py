"""What a stage gives to the worker loop, and what the loop gives to a stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fanlight.queue.v1 import queue_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One finished picture, encoded. `seed` is what it was painted with; None for a control image."""

    data: bytes
    width_px: int
    height_px: int
    seed: int | None = None
    # What a safety checker said; None where there was none.
    nsfw: bool | None = None
    # JSON with all that it takes to make it again; may be empty.
    provenance: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a task came to. `spans`: name and seconds of each stretch of the work."""

    outputs: Sequence[Output]
    spans: Sequence[tuple[str, float]] = ()


class Fetching(Protocol):
    """How a download stands, whoever does it."""

    @property
    def reference(self) -> str: ...
    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def bytes_per_s(self) -> float: ...
    @property
    def seconds_left(self) -> float | None: ...
    @property
    def source(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    step: int = 0
    steps: int = 0
    # An encoded small picture; empty where there is none.
    preview: bytes = field(default=b"", repr=False)
    # Weights that the task needs, while they come.
    fetch: Fetching | None = None


# May be called from any thread.
Report = Callable[[Progress], None]


class Stage(Protocol):
    """One kind of work, such as `preprocess`."""

    name: str

    def capabilities(self) -> queue_pb2.Capabilities:
        """What it can do; asked again before every poll, so it must be cheap."""
        ...

    def describe(self, worker: queue_pb2.Worker) -> None:
        """Fill in what changes: device, models held in VRAM, RAM and on disk, step time.

        And the link's goodput, where the stage fetches weights itself; else the loop's own figure stands.
        """
        ...

    async def run(self, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        """Do one task, whose pictures are `data` by now. Cancelling the call stops the work within a step.

        Raises FanlightError; whether it is the request's fault says `is_request_fault`.
        """
        ...
