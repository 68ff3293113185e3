"""What a stage gives to the worker loop, and what the loop gives to a stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from google.protobuf.message import Message

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


Request = TypeVar("Request", bound=Message)


class Stage(Protocol[Request]):
    """One kind of work, such as `preprocess`: a request message, and what does it."""

    name: str
    # What its tasks carry, such as fanlight.preprocessor.v1.AnnotateRequest.
    request_type: type[Request]

    def capabilities(self) -> queue_pb2.Capabilities:
        """What it can do, whatever it has loaded; the loop adds the contract's revision and sorts the rest.

        Asked before every poll: the same object until something changes, then another one.
        """
        ...

    def describe(self, worker: queue_pb2.Worker) -> None:
        """Fill in what changes: device, models held in VRAM, RAM and on disk, times of a step.

        And the link's goodput, where the stage fetches weights itself; else the loop's own figure stands.
        """
        ...

    async def run(self, request: Request, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        """Do one task. `request` is what `task.request` holds, with its images as `data` and no field unknown here.

        Cancelling the call stops the work within a step. Raises FanlightError: only one with `is_request_fault` ends
        the task for good; for any other, another node is tried.
        """
        ...
