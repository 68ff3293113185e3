"""What every stored job fulfills, besides its types. Pure.

A record that breaks one of these was damaged: it would stop whatever works with it. It is set aside when it is read.
"""

from collections.abc import Iterator

from services.gateway.domain.job import Job, Output, Task, TaskState

# The year 10000: no protobuf timestamp is later.
TIME_LIMIT_S = 253_402_300_800.0
COUNT_LIMIT = 2**32 - 1
PRIORITY_LIMIT = 2**31 - 1
SEED_LIMIT = 2**64 - 1
# States that only a task is in whose inputs exist.
_BEGUN = (TaskState.QUEUED, TaskState.LEASED, TaskState.JUDGING, TaskState.SUCCEEDED)


def fault_of(job: Job) -> str:
    """The first thing that cannot be, with its field; empty for a sound job."""
    return next(_faults(job), "")


def _faults(job: Job) -> Iterator[str]:
    if not job.requests:
        yield "requests: are none; the client's request comes first"
    for name, value in (("revision", job.revision), ("redrives", job.redrives)):
        if not 0 <= value <= COUNT_LIMIT:
            yield f"{name}: is {value}; must be from 0 to {COUNT_LIMIT}"
    if abs(job.priority) > PRIORITY_LIMIT:
        yield f"priority: is {job.priority}; must be from -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}"
    yield from _wrong_times(create_time_s=job.create_time_s, end_time_s=job.end_time_s, deadline_s=job.deadline_s)
    for i, image in enumerate(job.control_images):
        if not 0 <= image.task <= len(job.tasks):
            yield f"control_images.{i}.task: is {image.task}; the tasks are 1 to {len(job.tasks)}"
    for number, task in enumerate(job.tasks, 1):
        yield from (f"tasks.{number - 1}.{fault}" for fault in _faults_of(task, number, job))
    if job.state.ended != all(task.state.ended for task in job.tasks):
        yield f"state: is {job.state.value}, which its tasks contradict"


def _faults_of(task: Task, number: int, job: Job) -> Iterator[str]:
    if task.number != number:
        yield f"number: is {task.number}; must be {number}: tasks are numbered in their order"
    if not 0 <= task.request < len(job.requests):
        yield f"request: is {task.request}; there are {len(job.requests)} requests"
    elif task.stage != job.requests[task.request].stage:
        yield f"stage: is {task.stage}, and its request's is {job.requests[task.request].stage}"
    for i, each in enumerate(task.inputs):
        if not 0 <= each.task <= len(job.tasks) or each.task == number:
            yield f"inputs.{i}.task: is {each.task}; must be another one of the tasks 1 to {len(job.tasks)}"
        elif not each.task and each.blob is None:
            yield f"inputs.{i}: has neither a task nor a blob"
        elif each.task and task.state in _BEGUN and not job.tasks[each.task - 1].outputs:
            yield f"inputs.{i}.task: is {each.task}, which has no output, and the task is {task.state.value}"
    if task.state is TaskState.LEASED and task.lease is None:
        yield "lease: is missing, and the task is leased"
    if task.state is TaskState.JUDGING and not (task.outputs and job.is_judged):
        yield "outputs: are none to judge, and the task is judging"
    if task.dead and task.failure is None:
        yield "failure: is missing, and the task is dead"
    if not 0 <= task.leases <= COUNT_LIMIT or not 0 <= task.forgiven <= len(task.attempts):
        yield f"leases, forgiven: are {task.leases} and {task.forgiven} of {len(task.attempts)} attempts"
    yield from _wrong_times(queue_time_s=task.queue_time_s, end_time_s=task.end_time_s, not_before_s=task.not_before_s)
    if task.lease is not None:
        yield from (f"lease.{fault}" for fault in _wrong_times(time_s=task.lease.time_s))
    for i, attempt in enumerate(task.attempts):
        wrong = _wrong_times(lease_time_s=attempt.lease_time_s, end_time_s=attempt.end_time_s)
        yield from (f"attempts.{i}.{fault}" for fault in wrong)
    for i, output in enumerate(task.outputs):
        yield from (f"outputs.{i}.{fault}" for fault in _wrong_numbers(output))


def _wrong_numbers(output: Output) -> Iterator[str]:
    for name, value in (("width_px", output.width_px), ("height_px", output.height_px)):
        if not 0 <= value <= COUNT_LIMIT:
            yield f"{name}: is {value}; must be from 0 to {COUNT_LIMIT}"
    if output.seed is not None and not 0 <= output.seed <= SEED_LIMIT:
        yield f"seed: is {output.seed}; must be from 0 to {SEED_LIMIT}"


def _wrong_times(**times: float) -> Iterator[str]:
    for name, time_s in times.items():
        if not 0 <= time_s < TIME_LIMIT_S:
            yield f"{name}: is {time_s}; must be a time before the year 10000"
