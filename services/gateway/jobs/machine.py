"""The life of a job and its tasks: functions from (job, event, now) to job. Pure.

A job comes back as the very same object when the event changes nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from fanlight.errors import Conflict, FailedPrecondition, LeaseLost
from services.gateway.jobs.model import (
    Attempt,
    Ending,
    Failure,
    Fault,
    Job,
    JobState,
    Lease,
    Output,
    Span,
    Task,
    TaskState,
)

FAILURES_LIMIT = 3
LOST_LEASES_LIMIT = 10
# A lease whose answer never arrived costs the task nothing, unless it had so many: then something is broken.
LEASES_LIMIT = 100
# Between tries, so that a lone broken node does not spend them all within seconds. The first lost lease costs no pause:
# the time until it was noticed was one.
PAUSE_FIRST_S = 5.0
PAUSE_FACTOR = 4.0
PAUSE_MAX_S = 60.0


class Standing(StrEnum):
    """What a token is to a task."""

    LIVE = "live"
    # It handed in the result.
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    LOST = "lost"


def standing(job: Job, number: int, token: str) -> Standing:
    task = job.task(number)
    if task is None or task.lease is None or task.lease.token != token:
        return Standing.LOST
    return {
        TaskState.LEASED: Standing.LIVE,
        TaskState.SUCCEEDED: Standing.COMPLETED,
        TaskState.CANCELLED: Standing.CANCELLED,
    }.get(task.state, Standing.LOST)


def lease(job: Job, number: int, lease: Lease, *, now_s: float) -> Job:
    """Conflict when the task cannot be leased any more."""
    task = job.task(number)
    if task is None or task.state is not TaskState.QUEUED:
        raise Conflict(f"{job.name}/tasks/{number} is not waiting")
    return _changed(job, replace(task, state=TaskState.LEASED, lease=lease, leases=task.leases + 1), now_s=now_s)


def complete(
    job: Job, number: int, token: str, *, outputs: Sequence[Output], spans: Sequence[Span], now_s: float
) -> Job:
    """LeaseLost for a token that is no longer the task's; the token that completed it may say so again."""
    if standing(job, number, token) is Standing.COMPLETED:
        return job
    task = _leased(job, number, token)
    done = replace(
        task, state=TaskState.SUCCEEDED, outputs=tuple(outputs), spans=tuple(spans), end_time_s=now_s, failure=None
    )
    return _changed(job, done, now_s=now_s)


def fail(
    job: Job, number: int, token: str, *, fault: Fault, failure: Failure, now_s: float, chance: float = 1.0
) -> Job:
    """The request's fault ends the task; a node's puts it back until its failures are spent. LeaseLost.

    `chance`, from 0 up to 1, shortens the pause before the next try to between half and all of it.
    """
    task = _leased(job, number, token)
    if fault is Fault.REQUEST:
        return _changed(job, _failed(task, failure, now_s), now_s=now_s)
    return _tried(job, task, Ending.FAILED, failure, now_s, chance)


def give_back(job: Job, number: int, token: str, *, now_s: float) -> Job:
    """The worker leaves; it counts as nothing. LeaseLost."""
    return _changed(job, _queued(_leased(job, number, token)), now_s=now_s)


def expire(job: Job, number: int, token: str, *, now_s: float, unheld: bool = False, chance: float = 1.0) -> Job:
    """A lease that ended without a word; nothing changes where the token is not the live one.

    `chance`: as for `fail`.
    `unheld`: the worker lives and does not know of the lease, as when the answer with it was lost on the way.
    """
    task = job.task(number)
    if task is None or standing(job, number, token) is not Standing.LIVE:
        return job
    assert task.lease is not None
    if unheld and task.leases < LEASES_LIMIT:
        return _changed(job, _queued(task), now_s=now_s)
    alone = task.alone or (task.lease.batch_size > 1 and not unheld)
    return _tried(job, replace(task, alone=alone), Ending.LOST, None, now_s, chance)


def cancel(job: Job, *, now_s: float) -> Job:
    if job.state.ended:
        return job
    tasks = tuple(_cancelled(task, now_s) for task in job.tasks)
    return replace(job, tasks=tasks, state=JobState.CANCELLED, end_time_s=now_s, revision=job.revision + 1)


def miss_deadline(job: Job, *, now_s: float) -> Job:
    """The job has taken longer than its client would wait: it fails, and what runs of it is told to stop."""
    if job.state.ended:
        return job
    failure = Failure(reason="DEADLINE_EXCEEDED", message="the job's deadline passed before it was done")
    first = next(task for task in job.tasks if not task.state.ended)
    return _changed(job, _failed(first, failure, now_s), now_s=now_s)


def redrive(job: Job, *, now_s: float) -> Job:
    """Try a job anew whose attempts were spent; its earlier attempts stay told and count no more. FailedPrecondition.

    What was finished stays finished; tokens of before are worth nothing.
    """
    if job.state is not JobState.FAILED or not any(task.dead for task in job.tasks):
        raise FailedPrecondition("only a job whose attempts are spent can be tried anew", field="name")
    done = succeeded(job.tasks)
    tasks = tuple(_again(task, is_ready=has_inputs(task, done), now_s=now_s) for task in job.tasks)
    return replace(
        job,
        tasks=tasks,
        state=_state_of(tasks),
        failure=None,
        end_time_s=0.0,
        deadline_s=0.0,
        redrives=job.redrives + 1,
        revision=job.revision + 1,
    )


def succeeded(tasks: Sequence[Task]) -> frozenset[int]:
    """The numbers of the tasks whose outputs are there."""
    return frozenset(task.number for task in tasks if task.state is TaskState.SUCCEEDED)


def has_inputs(task: Task, done: frozenset[int]) -> bool:
    """Whether every task that it takes something from has succeeded."""
    return all(not each.task or each.task in done for each in task.inputs)


def _again(task: Task, *, is_ready: bool, now_s: float) -> Task:
    if task.state is TaskState.SUCCEEDED:
        return task
    return replace(
        task,
        state=TaskState.QUEUED if is_ready else TaskState.BLOCKED,
        queue_time_s=now_s if is_ready else 0.0,
        end_time_s=0.0,
        not_before_s=0.0,
        lease=None,
        leases=0,
        forgiven=len(task.attempts),
        dead=False,
        failure=None,
    )


def _leased(job: Job, number: int, token: str) -> Task:
    task = job.task(number)
    if task is None or standing(job, number, token) is not Standing.LIVE:
        raise LeaseLost("the token is no longer the task's; drop the work")
    return task


def _tried(job: Job, task: Task, ending: Ending, failure: Failure | None, now_s: float, chance: float) -> Job:
    """The task after one more attempt that came to nothing: queued again, or dead."""
    lease = task.lease
    assert lease is not None
    attempt = Attempt(
        worker=lease.worker,
        node=lease.node,
        lease_time_s=lease.time_s,
        end_time_s=now_s,
        ending=ending,
        failure=failure,
    )
    task = replace(task, attempts=(*task.attempts, attempt), failure=failure)
    spent = sum(each.ending is ending for each in task.counted)
    if spent < (FAILURES_LIMIT if ending is Ending.FAILED else LOST_LEASES_LIMIT):
        pause_s = pause_before_next_s(spent if ending is Ending.FAILED else spent - 1, chance)
        return _changed(job, replace(_queued(task), not_before_s=now_s + pause_s if pause_s else 0.0), now_s=now_s)
    if failure is None:
        failure = Failure(reason="LEASES_LOST", message=f"{spent} workers vanished while they ran it")
    return _changed(job, replace(_failed(task, failure, now_s), dead=True), now_s=now_s)


def pause_before_next_s(tries: int, chance: float) -> float:
    """After so many tries that came to nothing: exponential, with jitter."""
    if tries <= 0:
        return 0.0
    return min(PAUSE_MAX_S, PAUSE_FIRST_S * PAUSE_FACTOR ** (tries - 1)) * (0.5 + chance / 2)


def _queued(task: Task) -> Task:
    return replace(task, state=TaskState.QUEUED, lease=None, not_before_s=0.0)


def _failed(task: Task, failure: Failure, now_s: float) -> Task:
    return replace(task, state=TaskState.FAILED, failure=failure, end_time_s=now_s)


def _cancelled(task: Task, now_s: float) -> Task:
    return task if task.state.ended else replace(task, state=TaskState.CANCELLED, end_time_s=now_s)


def _changed(job: Job, task: Task, *, now_s: float) -> Job:
    """The job with that task in its place, and what follows from it for the others and the whole."""
    tasks = tuple(task if each.number == task.number else each for each in job.tasks)
    if task.state is TaskState.FAILED:
        tasks = tuple(_cancelled(each, now_s) for each in tasks)
    elif task.state is TaskState.SUCCEEDED:
        done = succeeded(tasks)
        tasks = tuple(_unblocked(each, done, now_s) for each in tasks)
    state = _state_of(tasks)
    return replace(
        job,
        tasks=tasks,
        state=state,
        failure=task.failure if state is JobState.FAILED else None,
        end_time_s=now_s if state.ended else 0.0,
        revision=job.revision + 1,
    )


def _unblocked(task: Task, done: frozenset[int], now_s: float) -> Task:
    if task.state is not TaskState.BLOCKED or not has_inputs(task, done):
        return task
    return replace(task, state=TaskState.QUEUED, queue_time_s=now_s)


def _state_of(tasks: Sequence[Task]) -> JobState:
    states = {task.state for task in tasks}
    if TaskState.FAILED in states:
        return JobState.FAILED
    if states == {TaskState.SUCCEEDED}:
        return JobState.SUCCEEDED
    return JobState.RUNNING if states & {TaskState.LEASED, TaskState.SUCCEEDED} else JobState.QUEUED
