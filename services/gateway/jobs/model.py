"""A job, its tasks and what happened to them. Values only; `machine` says how they change.

Times are seconds since the epoch. When a lease expires is not in here: that is judged on a monotonic clock.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from services.gateway.jobs.painting import PaintOptions, loras_in, need
from services.kernel.blobs import BlobInfo

PREPROCESS = "preprocess"
DIFFUSION = "diffusion"

# A job is one record, read and written whole.
TASKS_LIMIT = 64

DEFAULT_TENANT = "default"


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
class ControlSource:
    """Where one control image comes from, and what it conditions."""

    # None: the worker makes the control image of the image and its mask, as for inpaint.
    picture: BlobInfo | None
    # Empty: the picture is the control image.
    annotator: str
    # Canonical JSON, defaults filled in; `{}` without an annotator.
    parameters: str
    controlnet: str
    scale: float | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Pictures to paint, as asked, with model, pipeline and ControlNets resolved."""

    model: str
    pipeline: str
    prompt: str
    negative_prompt: str
    # Both 0 where the model does not say its own.
    width_px: int
    height_px: int
    steps: int | None
    guidance_scale: float | None
    scheduler: str
    seed: int | None
    count: int
    controls: tuple[ControlSource, ...]
    preview_every_steps: int
    # The picture to start from, and which part of it is painted anew.
    image: BlobInfo | None = None
    mask: BlobInfo | None = None
    options: PaintOptions = field(default_factory=PaintOptions)

    @property
    def needs(self) -> frozenset[str]:
        """What a worker must offer, such as `checkpoint:starter`, `lora:cyanotype`."""
        return self.options.needs.union(
            [need("checkpoint", self.model)],
            [need("controlnet", each.controlnet) for each in self.controls],
            [need("lora", name) for name in loras_in(self.prompt)],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One control image to make."""

    picture: BlobInfo
    annotator: str
    parameters: str
    # Both 0: the picture's own size.
    width_px: int = 0
    height_px: int = 0


Work = Generation | Annotation


@dataclass(frozen=True, slots=True, kw_only=True)
class Paint:
    """A diffusion task: one picture of the job's generation."""

    seed: int


TaskWork = Paint | Annotation


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImage:
    """The control image of the generation's control in the same place, or of the annotation."""

    # None until the task has made it, and where the worker makes it.
    blob: BlobInfo | None
    annotator: str
    cached: bool = False
    # The task that makes it; 0 where none has to.
    task: int = 0
    # 0 where unknown.
    width_px: int = 0
    height_px: int = 0

    @property
    def is_awaited(self) -> bool:
        return self.blob is None and self.task != 0


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
    number: int
    stage: str
    work: TaskWork
    state: TaskState
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
    work: Work
    tasks: tuple[Task, ...]
    control_images: tuple[ControlImage, ...]
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

    def task(self, number: int) -> Task | None:
        return self.tasks[number - 1] if 0 < number <= len(self.tasks) else None


def task_name(job_id: str, number: int) -> str:
    return f"jobs/{job_id}/tasks/{number}"
