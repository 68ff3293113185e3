"""The state machine test finds what it is there for: each of these mistakes in the life of a task makes it fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fanlight.errors import Conflict, LeaseLost
from services.gateway.domain import machine
from services.gateway.domain.job import Job, Lease, Task, TaskState
from services.gateway.domain.machine import LeaseStatus
from tests.unit.gateway.test_machine import Life

TRIES = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    # The first one found is enough; it need not be the shortest.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
lease_status, complete, queued, failed = machine.lease_status, machine.complete, machine._queued, machine._failed


def two_leases(job: Job, number: int, lease: Lease, *, now_s: float) -> Job:
    task = job.task(number)
    if task is None or task.state not in (TaskState.QUEUED, TaskState.LEASED):
        raise Conflict("not waiting")
    return machine._changed(job, replace(task, state=TaskState.LEASED, lease=lease), now_s=now_s)


def late_tokens(job: Job, number: int, token: str) -> Task:
    task = job.task(number)
    if task is None or task.state is not TaskState.LEASED:
        raise LeaseLost("not leased")
    return task


def cancelled_completes(job: Job, number: int, token: str) -> Task:
    task = job.task(number)
    if task is None or lease_status(job, number, token) not in (LeaseStatus.LIVE, LeaseStatus.CANCELLED):
        raise LeaseLost("lost")
    return task


def ends_twice(job: Job, number: int, token: str, **kept: Any) -> Job:
    task = job.task(number)
    if task is not None and task.state is TaskState.SUCCEEDED:
        return machine._changed(job, replace(task, outputs=tuple(kept["outputs"]), end_time_s=99.0), now_s=99.0)
    return complete(job, number, token, **kept)


def gets_lost(task: Task) -> Task:
    return replace(queued(task), state=TaskState.BLOCKED)


def stays_blocked(task: Task, now_s: float) -> Task:
    return task


def never_ends(task: Task, failure: Any, now_s: float) -> Task:
    return replace(failed(task, failure, now_s), state=TaskState.LEASED)


MUTANTS: list[tuple[str, Callable[..., Any]]] = [
    ("lease", two_leases),
    ("_leased", late_tokens),
    ("_leased", cancelled_completes),
    ("complete", ends_twice),
    ("_queued", gets_lost),
    ("_unblocked", stays_blocked),
    ("_failed", never_ends),
]


def case(name: str, mutant: Callable[..., Any]) -> Any:
    quick = mutant in (two_leases, late_tokens, cancelled_completes)
    return pytest.param(name, mutant, id=mutant.__name__, marks=() if quick else pytest.mark.long)


@pytest.mark.parametrize(("name", "mutant"), [case(*each) for each in MUTANTS])
def test_a_mistake_is_found(name: str, mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, name, mutant)
    with pytest.raises((AssertionError, LeaseLost, Conflict)):
        run_state_machine_as_test(Life, settings=TRIES)
