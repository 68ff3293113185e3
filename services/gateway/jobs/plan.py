"""How a job becomes tasks that refer to one another's outputs: a graph, checked before the job exists. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fanlight.errors import InvalidField
from services.gateway.jobs.machine import has_inputs, succeeded
from services.gateway.jobs.model import (
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
from services.kernel.blobs import BlobInfo

# What tasks make and take.
IMAGE = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task to make. It and its inputs count from 1 in the order of the plan."""

    # Which of the plan's requests it does.
    request: int
    patch: bytes = field(default=b"", repr=False)
    inputs: tuple[Input, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job is to do."""

    # What was asked for comes first.
    requests: tuple[StageRequest, ...]
    tasks: tuple[NewTask, ...]
    # Those made by tasks, by their numbers in the plan, and those that the client gave.
    control_images: tuple[ControlImage, ...] = ()
    blobs: tuple[BlobInfo, ...] = ()


def check(plan: Plan, makes: Mapping[str, str]) -> None:
    """InvalidField where the tasks are too many, or no graph without cycles of outputs of the right kind.

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


def _stage_of(plan: Plan, number: int) -> str:
    return plan.requests[plan.tasks[number - 1].request].stage


def _refuse_cycles(plan: Plan) -> None:
    """Kahn's algorithm: take away what waits for nothing; what is left waits for itself."""
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
    plan: Plan,
    *,
    job_id: str,
    request_id: str,
    priority: int,
    now_s: float,
    made_before: Mapping[int, Output] | None = None,
    tenant: str = DEFAULT_TENANT,
    deadline_s: float = 0.0,
    webhook_url: str = "",
) -> Job:
    """`plan` has passed `check`. `made_before`: outputs of the plan's tasks that exist already; those need not run."""
    made_before = made_before or {}
    left = [number for number in range(1, len(plan.tasks) + 1) if number not in made_before]
    numbers = {number: place for place, number in enumerate(left, 1)}
    drafts = [_draft(plan, number, numbers, made_before) for number in left]
    done = succeeded(drafts)
    tasks = tuple(_begun(task, now_s) if has_inputs(task, done) else task for task in drafts)
    return Job(
        id=job_id,
        state=JobState.QUEUED if tasks else JobState.SUCCEEDED,
        create_time_s=now_s,
        end_time_s=0.0 if tasks else now_s,
        priority=priority,
        request_id=request_id,
        requests=plan.requests,
        tasks=tasks,
        control_images=tuple(_control_image(each, numbers, made_before) for each in plan.control_images),
        blobs=plan.blobs,
        tenant=tenant,
        deadline_s=deadline_s,
        webhook_url=webhook_url,
    )


def _draft(plan: Plan, number: int, numbers: Mapping[int, int], made: Mapping[int, Output]) -> Task:
    new = plan.tasks[number - 1]
    return Task(
        number=numbers[number],
        stage=plan.requests[new.request].stage,
        request=new.request,
        state=TaskState.BLOCKED,
        patch=new.patch,
        inputs=tuple(_input(each, numbers, made) for each in new.inputs),
    )


def _begun(task: Task, now_s: float) -> Task:
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
