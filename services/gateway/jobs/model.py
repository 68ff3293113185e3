"""A job, its tasks and what happened to them. Values only; `machine` says how they change.

Times are seconds since the epoch. When a lease expires is not in here: that is judged on a monotonic clock.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum

from services.kernel.blobs import BlobInfo

PREPROCESS = "preprocess"
DIFFUSION = "diffusion"

# A job is one record, read and written whole.
TASKS_LIMIT = 64

DEFAULT_TENANT = "default"

# How records write bytes.
BYTES_AS_BASE64 = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}


class TaskState(StrEnum):
    BLOCKED = "blocked"
    QUEUED = "queued"
    LEASED = "leased"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED)


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class Fault(StrEnum):
    """Who is to blame for a failure."""

    REQUEST = "request"
    NODE = "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    reason: str
    message: str
    field: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    name: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the scheduler orders a task by, taken from its request message."""

    # What a worker must offer, such as `checkpoint:starter`, `annotator:canny`, `safety_checker:block`.
    needs: frozenset[str] = frozenset()
    # What a worker must take at least, by name, such as `pixels`; sorted.
    amounts: tuple[tuple[str, int], ...] = ()
    # Empty for stages without.
    checkpoint: str = ""
    family: str = ""
    annotator: str = ""
    # Ids or references of all models that it takes, the checkpoint too, as workers report what they hold.
    models: frozenset[str] = frozenset()
    # LoRAs and their weights on the UNet; sorted.
    loras: tuple[tuple[str, float], ...] = ()
    # Both 0 where they are not known before the work begins.
    width_px: int = 0
    height_px: int = 0
    # Evaluations of the model, and whether each is one with guidance; 0 for stages without.
    steps: int = 0
    guided: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRequest:
    """The request message of a stage, checked and resolved: opaque here, but for its facts."""

    __pydantic_config__ = BYTES_AS_BASE64

    stage: str
    # Of the client's request, such as `generation`: errors name it.
    field: str
    message: bytes = dataclasses.field(repr=False)
    facts: Facts = dataclasses.field(default_factory=Facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An image that a task takes: a blob, or what another task of the job makes."""

    # Of the request message, such as `controls[0].image`.
    field: str
    # The number of the task that makes it; 0 where there is a blob.
    task: int = 0
    blob: BlobInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImage:
    """A control image that the job's images are conditioned on, or for an annotation the image itself."""

    # Empty where the client gave the control image.
    annotator: str = ""
    # The task that makes it; 0 where there is a blob.
    task: int = 0
    blob: BlobInfo | None = None
    cached: bool = False
    # 0 where unknown.
    width_px: int = 0
    height_px: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    blob: BlobInfo
    width_px: int
    height_px: int
    seed: int | None = None
    # What the safety checker said; None where it was off.
    nsfw: bool | None = None
    # JSON; empty for a control image.
    provenance: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A worker's right to finish a task. It stays on an ended task, to know its token again."""

    token: str
    worker: str
    node: str
    time_s: float
    # How many tasks were leased in the same batch, this one included.
    batch_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a worker last said to some gateway: lease tokens to how far their tasks are, as step and steps."""

    steps: dict[str, tuple[int, int]] = field(default_factory=dict)


class Ending(StrEnum):
    """How an attempt came to nothing."""

    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A try that came to nothing and counts. One that was given back leaves none."""

    worker: str
    node: str
    lease_time_s: float
    end_time_s: float
    ending: Ending
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    __pydantic_config__ = BYTES_AS_BASE64

    number: int
    stage: str
    # Which of the job's requests it does.
    request: int
    state: TaskState
    # What it has of its own, such as its seed: a message of the same type, merged over the request.
    patch: bytes = field(default=b"", repr=False)
    inputs: tuple[Input, ...] = ()
    # Since when it could have been leased; 0 while blocked.
    queue_time_s: float = 0.0
    end_time_s: float = 0.0
    # The live lease while LEASED; the last one after that.
    lease: Lease | None = None
    # Leases given so far.
    leases: int = 0
    attempts: tuple[Attempt, ...] = ()
    # How many of them count no more: somebody had the task tried anew.
    forgiven: int = 0
    # Not to be leased before; 0 where nothing holds it up.
    not_before_s: float = 0.0
    # Run it with no other beside it: a batch with it died.
    alone: bool = False
    # All its attempts are spent.
    dead: bool = False
    outputs: tuple[Output, ...] = ()
    spans: tuple[Span, ...] = ()
    failure: Failure | None = None
    # How far it is; not kept, filled in for those who ask.
    step: int = 0
    steps: int = 0

    @property
    def failed_nodes(self) -> frozenset[str]:
        return frozenset(a.node for a in self.counted if a.ending is Ending.FAILED)

    @property
    def counted(self) -> tuple[Attempt, ...]:
        """The attempts that count."""
        return self.attempts[self.forgiven :]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEstimate:
    """How long a job should still take; the slowest of its tasks counts."""

    tasks_ahead: int
    ready_s: float
    # What must still come to the node, and over which link.
    fetch_bytes: int = 0
    fetch_s: float = 0.0
    node: str = ""
    link_bps: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    id: str
    state: JobState
    create_time_s: float
    priority: int
    request_id: str
    # What was asked for comes first; then what its tasks do.
    requests: tuple[StageRequest, ...]
    tasks: tuple[Task, ...]
    control_images: tuple[ControlImage, ...] = ()
    # What its requests read.
    blobs: tuple[BlobInfo, ...] = ()
    end_time_s: float = 0.0
    failure: Failure | None = None
    # Counts the changes of the record, from 1.
    revision: int = 1
    # Whose it is: the name that the client's token carries.
    tenant: str = DEFAULT_TENANT
    # When it must have ended; 0 where nobody minds.
    deadline_s: float = 0.0
    # Who is told of its end; empty for nobody.
    webhook_url: str = ""
    # How often it was tried anew after its attempts were spent.
    redrives: int = 0

    # Not kept, filled in for those who ask, where anybody can tell.
    estimate: JobEstimate | None = None

    @property
    def name(self) -> str:
        return f"jobs/{self.id}"

    @property
    def asked(self) -> StageRequest:
        return self.requests[0]

    def task(self, number: int) -> Task | None:
        return self.tasks[number - 1] if 0 < number <= len(self.tasks) else None

    def request_of(self, task: Task) -> StageRequest:
        return self.requests[task.request]

    def made_by(self, number: int) -> "Output | None":
        """The first output of a task; None before it has succeeded."""
        task = self.task(number)
        return task.outputs[0] if task is not None and task.outputs else None


def task_name(job_id: str, number: int) -> str:
    return f"jobs/{job_id}/tasks/{number}"
