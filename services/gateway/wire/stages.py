"""The table of stages: a new one is a request message, a worker, and one entry here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message

from fanlight.contract.images import image_at
from fanlight.contract.needs import Needs
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import InvalidField
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.new_job import Draft, SourceImage
from services.gateway.jobs.model import DIFFUSION, PREPROCESS, Facts, Job, StageRequest, Task
from services.gateway.jobs.plan import IMAGE, NewTask, Plan, check
from services.gateway.wire import annotations, generations
from services.gateway.wire.blobs import put
from services.gateway.wire.catalog import require_stage
from services.gateway.wire.images import source_images
from services.gateway.wire.needs import Fleet, facts_of, newer_fields, require, within
from services.kernel.blobs import BlobInfo

# The field of a job for the request of a stage that has none of its own.
OTHER = "request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    # What its workers get.
    request_type: type[Message]
    # Checks a request against the fleet. InvalidField, NotFound, FailedPrecondition, Unavailable.
    draft: Callable[..., Draft]
    # What its tasks make, for the tasks that take it.
    makes: str = IMAGE
    # Of CreateJobRequest and Job.
    field: str = OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class OneTask:
    """A request that one task does as it is, for stages that need no more."""

    stage: str
    request: Message
    facts: Facts
    images: Sequence[SourceImage]
    tasks_limit: int = 1

    def plan(self, kept: Mapping[str, BlobInfo], draw: Callable[[], int]) -> Plan:
        whole = type(self.request)()
        whole.CopyFrom(self.request)
        for field, blob in kept.items():
            put(image_at(whole, field.removeprefix(f"{OTHER}.")), blob)
        message = whole.SerializeToString(deterministic=True)
        request = StageRequest(stage=self.stage, field=OTHER, message=message, facts=self.facts)
        return Plan(requests=(request,), tasks=(NewTask(request=0),), blobs=tuple(dict.fromkeys(kept.values())))


def one_task(stage: str, needs_of: Callable[[Message], Needs]) -> Callable[[Message, Fleet], OneTask]:
    """A stage's `draft` for requests that need nothing but what `needs_of` reads in them."""

    def draft(message: Message, fleet: Fleet) -> OneTask:
        require_stage(fleet.catalog(), stage)
        with within(OTHER):
            needs, newer = needs_of(message), newer_fields(message)
            needs = Needs(offers=(*needs.offers, *newer.offers), amounts=needs.amounts)
            require(fleet, needs)
        return OneTask(stage=stage, request=message, facts=facts_of(needs), images=source_images(message, OTHER))

    return draft


STAGES: dict[str, Stage] = {
    PREPROCESS: Stage(
        name=PREPROCESS,
        request_type=preprocessor_pb2.AnnotateRequest,
        draft=annotations.draft,
        field=annotations.FIELD,
    ),
    DIFFUSION: Stage(
        name=DIFFUSION,
        request_type=diffusion_pb2.GenerateRequest,
        draft=generations.draft,
        field=generations.FIELD,
    ),
}


@dataclass(frozen=True, slots=True)
class _Checked:
    """A draft whose plan is known to be a graph that can be done."""

    draft: Draft

    @property
    def images(self) -> Sequence[SourceImage]:
        return self.draft.images

    @property
    def tasks_limit(self) -> int:
        return self.draft.tasks_limit

    def plan(self, kept: Mapping[str, BlobInfo], draw: Callable[[], int]) -> Plan:
        plan = self.draft.plan(kept, draw)
        check(plan, {stage.name: stage.makes for stage in STAGES.values()})
        return plan


def draft_of(request: gateway_pb2.CreateJobRequest, fleet: Fleet) -> Draft:
    """What the request asks for, checked. Errors as a stage's `draft` has them."""
    field = request.WhichOneof("work")
    if field is None:
        raise InvalidField("is missing: ask for a generation or an annotation", field="work")
    if field == OTHER:
        stage, message = _unpacked(request.request)
        return _Checked(stage.draft(message, fleet))
    stage = next(each for each in STAGES.values() if each.field == field)
    return _Checked(stage.draft(getattr(request, field), fleet))


def _unpacked(packed: any_pb2.Any) -> tuple[Stage, Message]:
    """InvalidField for a message that no stage takes, or that cannot be read."""
    for stage in STAGES.values():
        if packed.TypeName() == stage.request_type.DESCRIPTOR.full_name:
            try:
                return stage, stage.request_type.FromString(packed.value)
            except DecodeError as error:
                raise InvalidField(f"holds bytes that are no {packed.TypeName()}", field=OTHER) from error
    known = ", ".join(stage.request_type.DESCRIPTOR.full_name for stage in STAGES.values())
    raise InvalidField(f"is a {packed.TypeName()[:80]!r}; the stages take {known}", field=OTHER)


def show(asked: StageRequest, job: gateway_pb2.Job) -> None:
    """Put what was asked for into the job's message."""
    stage = STAGES.get(asked.stage)
    if stage is None:
        return
    message = stage.request_type.FromString(asked.message)
    if stage.field == OTHER:
        job.request.Pack(message)
    else:
        getattr(job, stage.field).CopyFrom(message)


def seed_of(task: Task) -> int:
    """The one that the task was given, for a worker that does not say which it took; 0 for stages without seeds."""
    stage = STAGES.get(task.stage)
    seed = getattr(stage.request_type.FromString(task.patch), "seed", 0) if stage else 0
    return seed if isinstance(seed, int) else 0


def request_for(job: Job, task: Task) -> any_pb2.Any:
    """The message that a worker of the task's stage gets: with what is the task's own, and its inputs."""
    asked = job.request_of(task)
    # Messages that are written one after the other are read as merged.
    message = STAGES[asked.stage].request_type.FromString(asked.message + task.patch)
    for each in task.inputs:
        put(image_at(message, each.field), each.blob or _made(job, each.task))
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed


def _made(job: Job, number: int) -> BlobInfo:
    output = job.made_by(number)
    assert output is not None, "a task is leased after its inputs were made"
    return output.blob
