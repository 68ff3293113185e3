"""A job, its tasks and their attempts. Values only; `machine` says how they change.

Times are seconds since the epoch. When a lease expires is not here: that is measured on a monotonic clock.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from fanlight.contract.names import ANY
from services.kernel.blobs import BlobInfo

PREPROCESS = "preprocess"
DIFFUSION = "diffusion"

# A job is one record, read and written as a whole.
TASKS_LIMIT = 64

DEFAULT_TENANT = "default"
ANY_OF_A_KIND = f":{ANY}"

# How records write bytes.
BYTES_AS_BASE64 = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}


class TaskState(StrEnum):
    BLOCKED = "blocked"
    QUEUED = "queued"
    LEASED = "leased"
    # Its outputs are stored, and shown to nobody before the operator's moderation has judged them.
    JUDGING = "judging"
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
    """What is to blame for a failure."""

    REQUEST = "request"
    NODE = "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    reason: str
    message: str
    field: str = ""
    # The part that failed, such as `lora:cyanotype`; empty if unknown.
    part: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    name: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the scheduler orders a task by, taken from its request message."""

    # What a worker must offer, such as `checkpoint:starter`, `annotator:canny`, `safety_checker:block`.
    needs: frozenset[str] = frozenset()
    # The least limits of a worker, by name, such as `pixels`; sorted.
    amounts: tuple[tuple[str, int], ...] = ()
    # Empty for stages without one.
    checkpoint: str = ""
    family: str = ""
    annotator: str = ""
    # Ids or references of all its models, the checkpoint too, in the form in which workers report them.
    models: frozenset[str] = frozenset()
    # Those that are named by a reference, with their kinds, such as `lora:hf:org/repo`: the need is only `lora:*`.
    references: frozenset[str] = frozenset()
    # LoRAs and their weights on the UNet; sorted.
    loras: tuple[tuple[str, float], ...] = ()
    # Both 0 where they are not known before the work begins.
    width_px: int = 0
    height_px: int = 0
    # Of the image that is handed in, where that is not the size of what is generated.
    result_size_px: tuple[int, int] | None = None
    # Noise predictions, and whether each has guidance; 0 for stages without steps.
    steps: int = 0
    guided: bool = False

    @property
    def parts(self) -> frozenset[str]:
        """All that it needs and that may fail, by kind and name; no `lora:*`, which stands for any reference."""
        return frozenset(need for need in self.needs if not need.endswith(ANY_OF_A_KIND)) | self.references


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRequest:
    """The request message of a stage, checked and resolved: opaque here, except for its facts."""

    __pydantic_config__ = BYTES_AS_BASE64

    stage: str
    # The field of the client's request, such as `generation`; error messages name it.
    field: str
    message: bytes = dataclasses.field(repr=False)
    facts: Facts = dataclasses.field(default_factory=Facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An image that a task reads: a blob, or the output of another task of the job."""

    # The field of the request message, such as `controls[0].image`.
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
    # The safety checker's verdict; None where it was off.
    nsfw: bool | None = None
    # JSON; empty for a control image.
    provenance: str = ""
    # The node's word.
    warnings: tuple[str, ...] = ()
    # The operator's moderation's.
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a node handed in for a task."""

    node: str
    worker: str
    digest: str
    # Of a generated image: its worker's device, and its thumbnail's pixels in hexadecimal, as another node made it.
    device: str = ""
    thumbnail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultCheck:
    """What a job that repeats another job's task compares its result with."""

    # The name of the task.
    task: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A worker's right to finish a task. It stays on an ended task, so that its token is recognized."""

    token: str
    worker: str
    node: str
    time_s: float
    # How many tasks were leased in the same batch, this one included.
    batch_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a worker last reported to some gateway: lease tokens to the progress of their tasks, as step and steps.

    `fetched`: how many bytes of weights have come for the tasks that waited for some.
    """

    steps: dict[str, tuple[int, int]] = field(default_factory=dict)
    fetched: dict[str, int] = field(default_factory=dict)


class Ending(StrEnum):
    """How an attempt ended without a result."""

    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt that failed or was lost, and counts. A task that was given back leaves none."""

    worker: str
    node: str
    lease_time_s: float
    end_time_s: float
    ending: Ending
    failure: Failure | None = None
    # The worker said that the request is at fault, and another node was asked.
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    __pydantic_config__ = BYTES_AS_BASE64

    number: int
    stage: str
    # The index of its request among the job's requests.
    request: int
    state: TaskState
    # Its own values, such as its seed: a message of the same type, merged over the request.
    patch: bytes = field(default=b"", repr=False)
    inputs: tuple[Input, ...] = ()
    # Since when it waits to be leased; 0 while blocked.
    queue_time_s: float = 0.0
    end_time_s: float = 0.0
    # The live lease while LEASED; the last one after that.
    lease: Lease | None = None
    # Leases given so far.
    leases: int = 0
    attempts: tuple[Attempt, ...] = ()
    # How many of them no longer count, because the task was redriven.
    forgiven: int = 0
    # Back-off: not to be leased before; 0 for no back-off.
    not_before_s: float = 0.0
    # Run it alone: a batch with it was lost, or it failed beside other tasks, and nothing says which one was at fault.
    alone: bool = False
    # All its attempts are spent: it has a dead letter.
    dead: bool = False
    outputs: tuple[Output, ...] = ()
    spans: tuple[Span, ...] = ()
    failure: Failure | None = None
    # Other nodes go first: these have done the same before.
    other_nodes: frozenset[str] = frozenset()
    # Its progress; not stored, filled in for answers.
    step: int = 0
    steps: int = 0

    @property
    def failed_nodes(self) -> frozenset[str]:
        """Those that reported that they could not do it, for whatever fault, and those that must not repeat it."""
        return self.other_nodes | frozenset(a.node for a in self.counted if a.ending is Ending.FAILED)

    @property
    def refusals(self) -> tuple[Attempt, ...]:
        """The attempts whose workers said that the request is at fault."""
        return tuple(a for a in self.counted if a.refused)

    @property
    def awaits_second_opinion(self) -> bool:
        return self.state is TaskState.QUEUED and bool(self.refusals)

    @property
    def counted(self) -> tuple[Attempt, ...]:
        """The attempts that count."""
        return self.attempts[self.forgiven :]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEstimate:
    """How long a job should still take, by the slowest of its tasks."""

    tasks_ahead: int
    ready_s: float
    # What the node must still download, and over which link.
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
    # The client's request first, then those of its tasks.
    requests: tuple[StageRequest, ...]
    tasks: tuple[Task, ...]
    control_images: tuple[ControlImage, ...] = ()
    # The blobs that its requests read.
    blobs: tuple[BlobInfo, ...] = ()
    end_time_s: float = 0.0
    failure: Failure | None = None
    # Counts the changes of the record, from 1.
    revision: int = 1
    # The tenant of the client's token.
    tenant: str = DEFAULT_TENANT
    # When it must have ended; 0 for no deadline.
    deadline_s: float = 0.0
    # Called when it ends; empty for no webhook.
    webhook_url: str = ""
    # The pool whose nodes alone work on it; empty: any.
    pool: str = ""
    # How often it was redriven after its attempts were spent.
    redrives: int = 0
    # It repeats another job's task; None for what a client requested.
    check: ResultCheck | None = None
    # What the gateway did otherwise than the request may have meant, in sentences.
    warnings: tuple[str, ...] = ()
    # What the operator's moderation said of the request.
    labels: tuple[str, ...] = ()
    # The tenant's policy when it was created, one of `moderation.Policy`; empty: off.
    policy: str = ""
    # The operator's moderation judges its results before anybody sees them.
    is_judged: bool = False

    # Not stored; filled in for answers, where an estimate is possible.
    estimate: JobEstimate | None = None

    @property
    def name(self) -> str:
        return f"jobs/{self.id}"

    @property
    def request(self) -> StageRequest:
        """What the client requested."""
        return self.requests[0]

    def task(self, number: int) -> Task | None:
        return self.tasks[number - 1] if 0 < number <= len(self.tasks) else None

    def request_of(self, task: Task) -> StageRequest:
        return self.requests[task.request]

    def output_of(self, number: int) -> "Output | None":
        """The first output of a task; None before it has succeeded."""
        task = self.task(number)
        return task.outputs[0] if task is not None and task.outputs else None


def task_name(job_id: str, number: int) -> str:
    return f"jobs/{job_id}/tasks/{number}"


def blobs_of(job: Job) -> Iterator[BlobInfo]:
    """Every blob that the job's tasks read or wrote."""
    yield from job.blobs
    yield from (image.blob for image in job.control_images if image.blob is not None)
    yield from (output.blob for task in job.tasks for output in task.outputs)
