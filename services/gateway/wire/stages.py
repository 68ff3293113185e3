"""The table of stages: a new one is a request message, a worker, and one entry here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message

from fanlight.contract import annotation, generation
from fanlight.contract.images import image_at, images_of
from fanlight.contract.names import DEFAULT_SCOPE
from fanlight.contract.needs import Needs
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.app.records import UnreadableRecord
from services.gateway.app.submission import Draft, KeptImage, SourceImage
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Facts, Failure, Job, StageRequest, Task
from services.gateway.domain.moderation import Policy
from services.gateway.domain.plan import IMAGE, JobPlan, NewTask, check
from services.gateway.wire import annotations, generations
from services.gateway.wire.images import put_blob, source_images
from services.gateway.wire.needs import Fleet, facts_of, newer_fields, require, require_stage, within
from services.kernel.blobs import BlobInfo

# The field of a job for the request of a stage that has none of its own.
OTHER = "request"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEntry:
    name: str
    # The message that its workers get.
    request_type: type[Message]
    # Checks a request against the fleet. InvalidField, NotFound, FailedPrecondition, Unavailable.
    draft: Callable[..., Draft]
    # Checks what workers get by the contract alone. InvalidField and the like name the request's field.
    check: Callable[[Any], None] | None = None
    # What its tasks produce, for the tasks that take it as input.
    makes: str = IMAGE
    # Of CreateJobRequest and Job.
    field: str = OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class OneTask:
    """The draft of a request that one task does as it is, for stages that need no more."""

    stage: str
    request: Message
    facts: Facts
    images: Sequence[SourceImage]
    tasks_limit: int = 1

    def under(self, policy: Policy) -> "OneTask":
        """Of such stages no worker's checker is known."""
        return self

    def plan(self, kept: Mapping[str, KeptImage], draw: Callable[[], int]) -> JobPlan:
        whole = type(self.request)()
        whole.CopyFrom(self.request)
        for field, image in kept.items():
            put_blob(image_at(whole, field.removeprefix(f"{OTHER}.")), image.blob)
        message = whole.SerializeToString(deterministic=True)
        request = StageRequest(stage=self.stage, field=OTHER, message=message, facts=self.facts)
        blobs = tuple(dict.fromkeys(image.blob for image in kept.values()))
        return JobPlan(requests=(request,), tasks=(NewTask(request=0),), blobs=blobs)


def one_task(stage: str, needs_of: Callable[[Message], Needs]) -> Callable[[Message, Fleet], OneTask]:
    """A stage's `draft` for requests whose needs `needs_of` reads from them."""

    def draft(message: Message, fleet: Fleet) -> OneTask:
        require_stage(fleet.catalog(), stage)
        with within(OTHER):
            needs, newer = needs_of(message), newer_fields(message)
            needs = Needs(offers=(*needs.offers, *newer.offers), amounts=needs.amounts)
            require(fleet, stage, needs)
        return OneTask(stage=stage, request=message, facts=facts_of(needs), images=source_images(message, OTHER))

    return draft


def _check_generation(request: diffusion_pb2.GenerateRequest) -> None:
    generation.check(request)
    generation.check_resolved(request)


STAGES: dict[str, StageEntry] = {
    PREPROCESS: StageEntry(
        name=PREPROCESS,
        request_type=preprocessor_pb2.AnnotateRequest,
        draft=annotations.draft,
        check=annotation.check,
        field=annotations.FIELD,
    ),
    DIFFUSION: StageEntry(
        name=DIFFUSION,
        request_type=diffusion_pb2.GenerateRequest,
        draft=generations.draft,
        check=_check_generation,
        field=generations.FIELD,
    ),
}


@dataclass(frozen=True, slots=True)
class _Checked:
    """A draft whose plan is checked to be a graph that can be done."""

    draft: Draft

    @property
    def images(self) -> Sequence[SourceImage]:
        return self.draft.images

    @property
    def tasks_limit(self) -> int:
        return self.draft.tasks_limit

    def under(self, policy: Policy) -> "_Checked":
        return replace(self, draft=self.draft.under(policy))

    def plan(self, kept: Mapping[str, KeptImage], draw: Callable[[], int]) -> JobPlan:
        plan = self.draft.plan(kept, draw)
        check(plan, {stage.name: stage.makes for stage in STAGES.values()})
        return plan


@dataclass(frozen=True, slots=True)
class _Packed:
    """A draft whose request came in the field `request`, not in its stage's own: fields are named as the client did."""

    draft: Draft
    field: str

    @property
    def images(self) -> Sequence[SourceImage]:
        return [replace(each, field=_moved(each.field, self.field, OTHER)) for each in self.draft.images]

    @property
    def tasks_limit(self) -> int:
        return self.draft.tasks_limit

    def under(self, policy: Policy) -> "_Packed":
        with _packed(self.field):
            return replace(self, draft=self.draft.under(policy))

    def plan(self, kept: Mapping[str, KeptImage], draw: Callable[[], int]) -> JobPlan:
        with _packed(self.field):
            return self.draft.plan({_moved(name, OTHER, self.field): image for name, image in kept.items()}, draw)


def _moved(path: str, was: str, now: str) -> str:
    """The path below another field; unchanged where it does not begin with the first one."""
    return now + path[len(was) :] if path == was or path.startswith(f"{was}.") else path


@contextmanager
def _packed(field: str) -> Iterator[None]:
    try:
        yield
    except FanlightError as error:
        moved = _moved(error.field, field, OTHER)
        raise type(error)(error.message, field=moved, retry_after_s=error.retry_after_s) from error


def draft_of(request: gateway_pb2.CreateJobRequest, fleet: Fleet) -> Draft:
    """The work of the request, checked. Raises what a stage's `draft` raises."""
    field = request.WhichOneof("work")
    if field is None:
        raise InvalidField("is missing: ask for a generation or an annotation", field="work")
    if field == OTHER:
        stage, message = _unpacked(request.request)
        with _packed(stage.field):
            return _Checked(_Packed(stage.draft(message, fleet), stage.field))
    stage = next(each for each in STAGES.values() if each.field == field)
    return _Checked(stage.draft(getattr(request, field), fleet))


def _unpacked(packed: any_pb2.Any) -> tuple[StageEntry, Message]:
    """InvalidField for a message that no stage takes, or that cannot be read."""
    for stage in STAGES.values():
        if packed.TypeName() == stage.request_type.DESCRIPTOR.full_name:
            try:
                return stage, stage.request_type.FromString(packed.value)
            except DecodeError as error:
                raise InvalidField(f"contains bytes that are not a {packed.TypeName()}", field=OTHER) from error
    known = ", ".join(stage.request_type.DESCRIPTOR.full_name for stage in STAGES.values())
    raise InvalidField(f"is a {packed.TypeName()[:80]!r}; the stages take {known}", field=OTHER)


def show(asked: StageRequest, job: gateway_pb2.Job) -> None:
    """Put the requested work into the job's message."""
    stage = STAGES.get(asked.stage)
    if stage is None:
        return
    try:
        message = stage.request_type.FromString(asked.message)
    except DecodeError:
        # It is shown without.
        return
    if stage.field == OTHER:
        job.request.Pack(message)
    else:
        getattr(job, stage.field).CopyFrom(message)


def seed_of(task: Task) -> int:
    """The seed that the task was given, if the worker does not report one; 0 for stages without seeds."""
    stage = STAGES.get(task.stage)
    try:
        seed = getattr(stage.request_type.FromString(task.patch), "seed", 0) if stage else 0
    except DecodeError:
        return 0
    return seed if isinstance(seed, int) else 0


def request_for(job: Job, task: Task) -> any_pb2.Any:
    """The message that a worker of the task's stage gets: with what is the task's own, and its inputs.

    UnreadableRecord where the job's record has another message than its stage's, or inputs that it has no field for.
    """
    asked = job.request_of(task)
    stage = STAGES.get(asked.stage)
    if stage is None:
        raise UnreadableRecord(f"this gateway knows no stage {asked.stage[:80]!r}")
    try:
        # Concatenated protobuf messages are read as merged.
        message = stage.request_type.FromString(asked.message + task.patch)
    except DecodeError as error:
        raise UnreadableRecord(f"its message is no {stage.request_type.DESCRIPTOR.full_name}") from error
    for each in task.inputs:
        try:
            image = image_at(message, each.field)
        except InvalidField as error:
            raise UnreadableRecord(f"its message has no image {each.field[:80]!r}") from error
        put_blob(image, each.blob or _made(job, each.task))
    packed = any_pb2.Any()
    packed.Pack(message, deterministic=True)
    return packed


def images_of_task(job: Job, task: Task) -> Iterator[tuple[str, str]]:
    """Scope and digest of each image that the task's message names. UnreadableRecord."""
    stage = STAGES.get(task.stage)
    if stage is None:
        raise UnreadableRecord(f"this gateway knows no stage {task.stage[:80]!r}")
    request = stage.request_type()
    request_for(job, task).Unpack(request)
    for _, image in images_of(request):
        if image.HasField("blob"):
            yield image.blob.scope or DEFAULT_SCOPE, image.blob.digest


def confirms(job: Job, task: Task, failure: Failure) -> bool:
    """Whether the contract finds the same field of the task's request wrong as its worker did."""
    stage = STAGES.get(task.stage)
    if stage is None or stage.check is None or not failure.field:
        return False
    request = stage.request_type()
    request_for(job, task).Unpack(request)
    try:
        stage.check(request)
    except FanlightError as error:
        return error.is_request_fault and error.field == failure.field
    return False


def _made(job: Job, number: int) -> BlobInfo:
    output = job.output_of(number)
    assert output is not None, "a task is leased after its inputs were made"
    return output.blob
