"""Redriven dead letters: finished tasks stay finished, attempts count from zero, old tokens are void."""

from dataclasses import replace

import pytest

from fanlight.errors import FailedPrecondition, LeaseLost, NotFound
from services.gateway.app.completion import Renewal
from services.gateway.app.tenants import OPERATOR
from services.gateway.domain.job import DIFFUSION, Job, JobState, TaskState
from services.gateway.domain.machine import FAILURES_LIMIT, LeaseStatus
from tests.fakes.fleet import STARTER, STARTER_CANNY, Fleet, FleetWorker, control, generation


async def dead(fleet: Fleet, painter: FleetWorker, job: Job) -> str:
    """The name of its first task whose attempts are spent by now."""
    for _ in range(FAILURES_LIMIT):
        (task,) = await painter.lease()
        await painter.fail(task)
        fleet.rest()
    assert (await fleet.get(job)).state is JobState.FAILED
    (letter,) = await fleet.gateway.dead_letters.page(limit=9)
    return letter.task


async def test_a_dead_letter_is_redriven_and_succeeds(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation(2))
    name = await dead(fleet, painter, job)
    again = await fleet.gateway.redrives.redrive(name, OPERATOR)
    assert (again.state, again.failure, again.redrives) == (JobState.QUEUED, None, 1)
    assert await fleet.gateway.dead_letters.page(limit=9) == []
    assert await painter.work() == 2
    assert (await fleet.get(job)).state is JobState.SUCCEEDED


async def test_earlier_attempts_stay_recorded_and_no_longer_count(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    await fleet.gateway.redrives.redrive(await dead(fleet, painter, job), OPERATOR)
    fleet.rest(3_600)
    await dead(fleet, painter, job)
    (letter,) = await fleet.gateway.dead_letters.page(limit=9)
    assert len(letter.attempts) == 2 * FAILURES_LIMIT


async def test_what_was_finished_is_not_done_again(fleet: Fleet, painter: FleetWorker, annotator: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation(2, control()))
    await annotator.work()
    (task,) = await painter.lease()
    await painter.complete(task)
    again = await fleet.gateway.redrives.redrive(await dead(fleet, painter, job), OPERATOR)
    assert [task.state for task in again.tasks] == [TaskState.SUCCEEDED, TaskState.SUCCEEDED, TaskState.QUEUED]
    assert again.state is JobState.RUNNING


async def test_an_earlier_token_is_refused_after_the_redrive(fleet: Fleet, painter: FleetWorker) -> None:
    other = fleet.worker(DIFFUSION, "other")
    job = await fleet.gateway.jobs.create(generation(2))
    (late,) = await other.lease()
    await fleet.gateway.redrives.redrive(await dead(fleet, painter, job), OPERATOR)
    with pytest.raises(LeaseLost):
        await other.complete(late)


async def test_a_redriven_job_is_an_open_one_after_a_restart(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    await fleet.gateway.redrives.redrive(await dead(fleet, painter, job), OPERATOR)
    fleet.clock.advance(30 * 86_400)
    await painter.come()
    await fleet.gateway.sweep()
    async with fleet.restarted().running() as restarted:
        assert (await restarted.get(job)).state is JobState.QUEUED


async def test_a_letter_whose_images_are_gone_cannot_be_redriven(
    fleet: Fleet, painter: FleetWorker, annotator: FleetWorker
) -> None:
    job = await fleet.gateway.jobs.create(generation(1, control()))
    await annotator.work()
    name = await dead(fleet, painter, job)
    (photo,) = job.blobs
    await fleet.blobs.delete(photo.scope, photo.digest)
    with pytest.raises(FailedPrecondition):
        await fleet.gateway.redrives.redrive(name, OPERATOR)


async def test_what_is_not_a_dead_letter_is_not_redriven(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    with pytest.raises(NotFound):
        await fleet.gateway.redrives.redrive(f"{job.name}/tasks/1", OPERATOR)


async def test_a_job_that_misses_its_deadline_fails_and_its_workers_learn_it(
    fleet: Fleet, painter: FleetWorker
) -> None:
    job = await fleet.gateway.jobs.create(replace(generation(2), deadline_s=30.0))
    (task,) = await painter.lease()
    fleet.clock.jump(3_600)
    await fleet.gateway.queue.end_late_jobs()
    assert (await fleet.get(job)).state is JobState.RUNNING
    fleet.clock.advance(31)
    await fleet.gateway.queue.end_late_jobs()
    done = await fleet.get(job)
    assert (done.state, done.failure.reason) == (JobState.FAILED, "DEADLINE_EXCEEDED")
    (answer,) = await fleet.gateway.queue.renew("w", [Renewal(token=task.token)])
    assert answer.status is not LeaseStatus.LIVE
    assert await painter.lease(held=()) == []
    assert await fleet.gateway.dead_letters.page(limit=9) == []


async def test_a_checkpoint_and_a_controlnet_on_different_workers_are_refused_at_once(fleet: Fleet) -> None:
    await fleet.worker(DIFFUSION, "one", models=(STARTER,)).come()
    await fleet.worker(DIFFUSION, "two", models=(STARTER_CANNY,)).come()
    await fleet.worker("preprocess").come()
    with pytest.raises(FailedPrecondition, match="checkpoint:starter"):
        generation(1, control(), workers=fleet.gateway.workers.offers)
    assert await fleet.gateway.jobs.create(generation(workers=fleet.gateway.workers.offers))
