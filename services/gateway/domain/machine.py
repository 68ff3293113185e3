"""The state machine of a job and its tasks: functions from (job, event, now) to job. Pure.

An event that changes nothing returns the same object.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from fanlight.errors import Conflict, FailedPrecondition, LeaseLost
from services.gateway.domain.job import (
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
# A lease whose answer never arrived counts as no attempt, unless the task had so many: then something is broken.
LEASES_LIMIT = 100
# The back-off between attempts, so that a lone broken node does not spend them all within seconds: it is one step
# longer where the same node failed the task again. There is none after the first lost lease: the time until it expired
# was one.
BACKOFF_FIRST_S = 5.0
BACKOFF_FACTOR = 4.0
BACKOFF_MAX_S = 60.0


class LeaseStatus(StrEnum):
    """What a token is worth to its task."""

    LIVE = "live"
    # The task was completed with this token.
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    LOST = "lost"


def lease_status(job: Job, number: int, token: str) -> LeaseStatus:
    task = job.task(number)
    if task is None or task.lease is None or task.lease.token != token:
        return LeaseStatus.LOST
    return {
        TaskState.LEASED: LeaseStatus.LIVE,
        TaskState.JUDGING: LeaseStatus.COMPLETED,
        TaskState.SUCCEEDED: LeaseStatus.COMPLETED,
        TaskState.CANCELLED: LeaseStatus.CANCELLED,
    }.get(task.state, LeaseStatus.LOST)


def lease(job: Job, number: int, lease: Lease, *, now_s: float) -> Job:
    """Conflict where the task does not wait."""
    task = job.task(number)
    if task is None or task.state is not TaskState.QUEUED:
        raise Conflict(f"{job.name}/tasks/{number} is not waiting")
    return _changed(job, replace(task, state=TaskState.LEASED, lease=lease, leases=task.leases + 1), now_s=now_s)


def complete(
    job: Job, number: int, token: str, *, outputs: Sequence[Output], spans: Sequence[Span], now_s: float
) -> Job:
    """LeaseLost for a token that is no longer the task's; completing again with the same token changes nothing.

    What the client asked for of a job that is judged is not published yet: `publish` or `withhold` ends that task.
    """
    if lease_status(job, number, token) is LeaseStatus.COMPLETED:
        return job
    task = _leased(job, number, token)
    state = TaskState.JUDGING if job.is_judged and task.stage == job.request.stage else TaskState.SUCCEEDED
    done = replace(task, state=state, outputs=tuple(outputs), spans=tuple(spans), end_time_s=now_s, failure=None)
    return _changed(job, done, now_s=now_s)


def publish(job: Job, number: int, *, labels: Sequence[str] = (), now_s: float) -> Job:
    """The verdict on a task's outputs lets them pass. No change where none is awaited."""
    task = job.task(number)
    if task is None or task.state is not TaskState.JUDGING:
        return job
    outputs = tuple(replace(each, labels=tuple(labels)) for each in task.outputs)
    return _changed(job, replace(task, state=TaskState.SUCCEEDED, outputs=outputs, end_time_s=now_s), now_s=now_s)


def withhold(job: Job, number: int, *, failure: Failure, now_s: float) -> Job:
    """The verdict on a task's outputs withholds them: they are dropped, and the job fails. No change as above."""
    task = job.task(number)
    if task is None or task.state is not TaskState.JUDGING:
        return job
    return _changed(job, _failed(task, failure, now_s), now_s=now_s)


def fail(
    job: Job,
    number: int,
    token: str,
    *,
    fault: Fault,
    failure: Failure,
    now_s: float,
    chance: float = 1.0,
    confirmed: bool = True,
    is_beside_others: bool = False,
) -> Job:
    """A fault of the request ends the task; one of the node is retried until the attempts are spent. LeaseLost.

    `chance`, from 0 up to 1, is the jitter: it shortens the back-off to between half and all of it.
    `confirmed`: nobody else is to be asked whether the request is at fault. Otherwise the task goes back to the queue
    once, for another node's opinion.
    `is_beside_others`: its worker had other tasks too, which may be to blame: it is retried alone, unless a part is
    named.
    """
    task = _leased(job, number, token)
    if fault is Fault.NODE:
        task = replace(task, alone=task.alone or (is_beside_others and not failure.part))
        return _after_attempt(job, task, Ending.FAILED, failure, now_s, chance)
    if confirmed or task.refusals:
        return _changed(job, _failed(task, failure, now_s), now_s=now_s)
    attempt = replace(_attempt(task, Ending.FAILED, failure, now_s), refused=True)
    return _changed(job, _queued(replace(task, attempts=(*task.attempts, attempt), failure=failure)), now_s=now_s)


def uphold(job: Job, number: int, *, now_s: float) -> Job:
    """No second opinion came in time: end the task with what the first node said. No change where none is awaited."""
    task = job.task(number)
    if task is None or not task.awaits_second_opinion:
        return job
    failure = task.refusals[-1].failure
    assert failure is not None
    return _changed(job, _failed(task, failure, now_s), now_s=now_s)


def give_back(job: Job, number: int, token: str, *, now_s: float) -> Job:
    """The worker returns the task unfinished; this counts as no attempt. LeaseLost."""
    return _changed(job, _queued(_leased(job, number, token)), now_s=now_s)


def expire(
    job: Job,
    number: int,
    token: str,
    *,
    now_s: float,
    unheld: bool = False,
    chance: float = 1.0,
    failure: Failure | None = None,
) -> Job:
    """The lease was not renewed in time; nothing changes where the token is not the live one.

    `chance`: as for `fail`. `failure`: why the lease ends although it is renewed.
    `unheld`: the worker lives and does not know of the lease, as when the answer with it was lost.
    """
    task = job.task(number)
    if task is None or lease_status(job, number, token) is not LeaseStatus.LIVE:
        return job
    assert task.lease is not None
    if unheld and task.leases < LEASES_LIMIT:
        return _changed(job, _queued(task), now_s=now_s)
    alone = task.alone or (task.lease.batch_size > 1 and not unheld)
    return _after_attempt(job, replace(task, alone=alone), Ending.LOST, failure, now_s, chance)


def cancel(job: Job, *, now_s: float) -> Job:
    if job.state.ended:
        return job
    tasks = tuple(_cancelled(task, now_s) for task in job.tasks)
    return replace(job, tasks=tasks, state=JobState.CANCELLED, end_time_s=now_s, revision=job.revision + 1)


def miss_deadline(job: Job, *, now_s: float) -> Job:
    """The job's deadline has passed: it fails, and its other tasks are cancelled."""
    if job.state.ended:
        return job
    failure = Failure(reason="DEADLINE_EXCEEDED", message="the job's deadline passed before it was done")
    first = next(task for task in job.tasks if not task.state.ended)
    return _changed(job, _failed(first, failure, now_s), now_s=now_s)


def redrive(job: Job, *, now_s: float) -> Job:
    """Retry a job whose attempts were spent; earlier attempts stay recorded and no longer count. FailedPrecondition.

    Finished tasks stay finished; earlier tokens are void.
    """
    if job.state is not JobState.FAILED or not any(task.dead for task in job.tasks):
        raise FailedPrecondition("only a job whose attempts are spent can be redriven", field="name")
    done = succeeded(job.tasks)
    tasks = tuple(_redriven(task, is_ready=has_inputs(task, done), now_s=now_s) for task in job.tasks)
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
    """The numbers of the tasks that have outputs."""
    return frozenset(task.number for task in tasks if task.state is TaskState.SUCCEEDED)


def has_inputs(task: Task, done: frozenset[int]) -> bool:
    """Whether every task whose output it reads has succeeded."""
    return all(not each.task or each.task in done for each in task.inputs)


def _redriven(task: Task, *, is_ready: bool, now_s: float) -> Task:
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
    if task is None or lease_status(job, number, token) is not LeaseStatus.LIVE:
        raise LeaseLost("the token is no longer the task's; drop the work")
    return task


def _after_attempt(job: Job, task: Task, ending: Ending, failure: Failure | None, now_s: float, chance: float) -> Job:
    """After one more attempt without a result: queued again with a back-off, or dead."""
    attempt = _attempt(task, ending, failure, now_s)
    is_same_node = attempt.node in task.failed_nodes
    task = replace(task, attempts=(*task.attempts, attempt), failure=failure)
    spent = sum(each.ending is ending and not each.refused for each in task.counted)
    if spent < (FAILURES_LIMIT if ending is Ending.FAILED else LOST_LEASES_LIMIT):
        wait_s = backoff_s(spent + is_same_node if ending is Ending.FAILED else spent - 1, chance)
        return _changed(job, replace(_queued(task), not_before_s=now_s + wait_s if wait_s else 0.0), now_s=now_s)
    if failure is None:
        failure = Failure(reason="LEASES_LOST", message=f"{spent} workers vanished while they ran it")
    return _changed(job, replace(_failed(task, failure, now_s), dead=True), now_s=now_s)


def _attempt(task: Task, ending: Ending, failure: Failure | None, now_s: float) -> Attempt:
    lease = task.lease
    assert lease is not None
    return Attempt(
        worker=lease.worker,
        node=lease.node,
        lease_time_s=lease.time_s,
        end_time_s=now_s,
        ending=ending,
        failure=failure,
    )


def backoff_s(attempts: int, chance: float) -> float:
    """The back-off after so many attempts without a result: exponential, with jitter by `chance`, from 0 up to 1."""
    if attempts <= 0:
        return 0.0
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * BACKOFF_FACTOR ** (attempts - 1)) * (0.5 + chance / 2)


def _queued(task: Task) -> Task:
    return replace(task, state=TaskState.QUEUED, lease=None, not_before_s=0.0)


def _failed(task: Task, failure: Failure, now_s: float) -> Task:
    return replace(task, state=TaskState.FAILED, outputs=(), failure=failure, end_time_s=now_s)


def _cancelled(task: Task, now_s: float) -> Task:
    """Outputs that were not judged go with it."""
    if task.state.ended:
        return task
    return replace(task, state=TaskState.CANCELLED, outputs=(), end_time_s=now_s)


def _changed(job: Job, task: Task, *, now_s: float) -> Job:
    """The job with the changed task, and what follows for its other tasks and its state."""
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
    begun = {TaskState.LEASED, TaskState.JUDGING, TaskState.SUCCEEDED}
    return JobState.RUNNING if states & begun else JobState.QUEUED
