"""How a job becomes a graph of tasks that read one another's outputs, checked before the job exists. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fanlight.errors import InvalidField
from services.gateway.domain.job import (
    DEFAULT_TENANT,
    TASKS_LIMIT,
    ControlImage,
    Input,
    Job,
    JobState,
    Output,
    StageRequest,
    Task,
    TaskState,
)
from services.gateway.domain.machine import has_inputs, succeeded
from services.gateway.domain.nodes import pool_need
from services.kernel.blobs import BlobInfo

# What tasks read and make.
IMAGE = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task of a plan. Tasks are numbered from 1 in the plan's order."""

    # The index of its request among the plan's requests.
    request: int
    patch: bytes = field(default=b"", repr=False)
    inputs: tuple[Input, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """The requests, tasks and images of a job to be created."""

    # The client's request first.
    requests: tuple[StageRequest, ...]
    tasks: tuple[NewTask, ...]
    # Made by tasks, whose numbers they name, or given by the client.
    control_images: tuple[ControlImage, ...] = ()
    blobs: tuple[BlobInfo, ...] = ()
    # What is done otherwise than the request may have meant, in sentences.
    warnings: tuple[str, ...] = ()


def check(plan: JobPlan, makes: Mapping[str, str]) -> None:
    """InvalidField where there are too many tasks, a cycle, or an input that is not an image.

    `makes`: what the tasks of each stage make, such as an image.
    """
    if len(plan.tasks) > TASKS_LIMIT:
        raise InvalidField(f"are {len(plan.tasks)}; at most {TASKS_LIMIT}", field="tasks")
    for number, task in enumerate(plan.tasks, 1):
        for i, each in enumerate(task.inputs):
            where = f"tasks[{number - 1}].inputs[{i}].task"
            if each.task < 0 or each.task > len(plan.tasks):
                raise InvalidField(f"is {each.task}; the tasks are 1 to {len(plan.tasks)}", field=where)
            made = makes.get(_stage_of(plan, each.task), "") if each.task else IMAGE
            if made != IMAGE:
                raise InvalidField(f"is {each.task}, which makes {made or 'nothing'}; {IMAGE} is needed", field=where)
    _refuse_cycles(plan)


def _stage_of(plan: JobPlan, number: int) -> str:
    return plan.requests[plan.tasks[number - 1].request].stage


def _refuse_cycles(plan: JobPlan) -> None:
    """Kahn's algorithm: remove tasks that wait for none; what is left is in or behind a cycle."""
    waits = {number: {each.task for each in task.inputs if each.task} for number, task in enumerate(plan.tasks, 1)}
    while free := [number for number, needs in waits.items() if not needs]:
        for number in free:
            del waits[number]
        for needs in waits.values():
            needs.difference_update(free)
    if waits:
        first = min(waits)
        numbers = ", ".join(map(str, sorted(waits)))
        raise InvalidField(f"wait for one another: {numbers}", field=f"tasks[{first - 1}].inputs")


def create(
    plan: JobPlan,
    *,
    job_id: str,
    request_id: str,
    priority: int,
    now_s: float,
    made_before: Mapping[int, Output] | None = None,
    tenant: str = DEFAULT_TENANT,
    deadline_s: float = 0.0,
    webhook_url: str = "",
    pool: str = "",
) -> Job:
    """`plan` has passed `check`. `made_before`: cached outputs of the plan's tasks, which need not run.

    With a `pool` all its tasks need a node of it.
    """
    made_before = made_before or {}
    left = [number for number in range(1, len(plan.tasks) + 1) if number not in made_before]
    numbers = {number: place for place, number in enumerate(left, 1)}
    drafts = [_draft(plan, number, numbers, made_before) for number in left]
    done = succeeded(drafts)
    tasks = tuple(_queued(task, now_s) if has_inputs(task, done) else task for task in drafts)
    return Job(
        id=job_id,
        state=JobState.QUEUED if tasks else JobState.SUCCEEDED,
        create_time_s=now_s,
        end_time_s=0.0 if tasks else now_s,
        priority=priority,
        request_id=request_id,
        requests=tuple(in_pool(each, pool) for each in plan.requests),
        tasks=tasks,
        control_images=tuple(_control_image(each, numbers, made_before) for each in plan.control_images),
        blobs=plan.blobs,
        tenant=tenant,
        deadline_s=deadline_s,
        webhook_url=webhook_url,
        pool=pool,
        warnings=plan.warnings,
    )


def in_pool(request: StageRequest, pool: str) -> StageRequest:
    """For that pool's nodes alone; empty: any."""
    if not pool:
        return request
    return replace(request, facts=replace(request.facts, needs=request.facts.needs | {pool_need(pool)}))


def _draft(plan: JobPlan, number: int, numbers: Mapping[int, int], made: Mapping[int, Output]) -> Task:
    new = plan.tasks[number - 1]
    return Task(
        number=numbers[number],
        stage=plan.requests[new.request].stage,
        request=new.request,
        state=TaskState.BLOCKED,
        patch=new.patch,
        inputs=tuple(_input(each, numbers, made) for each in new.inputs),
    )


def _queued(task: Task, now_s: float) -> Task:
    return replace(task, state=TaskState.QUEUED, queue_time_s=now_s)


def _input(given: Input, numbers: Mapping[int, int], made: Mapping[int, Output]) -> Input:
    if given.task in made:
        return Input(field=given.field, blob=made[given.task].blob)
    return replace(given, task=numbers[given.task]) if given.task else given


def _control_image(image: ControlImage, numbers: Mapping[int, int], made: Mapping[int, Output]) -> ControlImage:
    if image.task in made:
        output = made[image.task]
        return replace(
            image, task=0, blob=output.blob, cached=True, width_px=output.width_px, height_px=output.height_px
        )
    return replace(image, task=numbers[image.task]) if image.task else image
