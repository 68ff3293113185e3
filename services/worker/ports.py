"""What a stage gives to the worker loop, and what the loop gives to a stage."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol, TypeVar, runtime_checkable

from google.protobuf.message import Message

from fanlight.queue.v1 import queue_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """One finished image, encoded. `seed`: what it was generated with; None for a control image."""

    data: bytes
    width_px: int
    height_px: int
    seed: int | None = None
    # What the safety checker found; None if there is no safety checker.
    nsfw: bool | None = None
    # JSON with everything that is needed to generate it again; may be empty.
    provenance: str = ""
    # What was done otherwise than the request may have meant, in sentences; the gateway takes 16.
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a task. `spans`: name and seconds of each phase of the work."""

    outputs: Sequence[StageOutput]
    spans: Sequence[tuple[str, float]] = ()


class DownloadStatus(Protocol):
    """The state of a download of weights."""

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
class MadePreview:
    """A small encoded image, empty where there is none after all. `cpu_s`: the CPU seconds that it took."""

    data: bytes = field(repr=False)
    cpu_s: float = 0.0


# Makes a preview. Awaited only if a report is to be sent.
Preview = Callable[[], Awaitable[MadePreview]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    step: int = 0
    steps: int = 0
    # None where none is due at this step: one that is due already stays so.
    preview: Preview | None = field(default=None, repr=False)
    # Weights that the task needs, while they are downloaded.
    fetch: DownloadStatus | None = None


# May be called from any thread.
Report = Callable[[StageProgress], None]

Request = TypeVar("Request", bound=Message)


class Stage(Protocol[Request]):
    """One kind of work, such as `preprocess`: its request message and the code that serves it."""

    name: str
    # The type of its tasks' requests, such as fanlight.preprocessor.v1.AnnotateRequest.
    request_type: type[Request]

    def capabilities(self) -> queue_pb2.Capabilities:
        """What it can do, whether loaded or not; the loop sorts it and adds the contract's revision.

        Called before every poll: returns the same object until something changes, then another one.
        """
        ...

    def describe(self, worker: queue_pb2.Worker) -> None:
        """Fill in what changes: device, models held in VRAM, RAM and on disk, times of a step.

        Also the link's goodput if the stage fetches weights itself; else the loop fills in its own measurement.
        """
        ...

    async def run(self, request: Request, task: queue_pb2.LeasedTask, report: Report) -> Outcome:
        """Run one task. `request` is the message in `task.request`, its images as `data`, without unknown fields.

        Cancelling the call stops the work within a step. Raises FanlightError: one with `is_request_fault` fails the
        task for good; after any other error it is retried on another node.
        """
        ...


class StageCondition(Enum):
    """LOADING: it downloads or loads models; tasks wait for them. LOST: only a new process can use the device."""

    LOADING = auto()
    WARM = auto()
    LOST = auto()


@runtime_checkable
class ReportsCondition(Protocol):
    """A stage that is not always WARM."""

    def condition(self) -> StageCondition: ...


@runtime_checkable
class Prefetches(Protocol):
    """A stage that can fetch models to this machine before a task needs them."""

    async def prefetch(self, model: str, kind: str) -> None:
        """Return once the model is on disk. After a cancellation the next call may resume. Raises FanlightError."""
        ...
