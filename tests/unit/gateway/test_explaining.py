"""Why a job waits and how long it should still take, as clients see it."""

import asyncio
from dataclasses import replace

import pytest

from fanlight.errors import NotFound
from services.gateway.app.explain import ESTIMATES_AT_A_TIME
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.workers import ReportedStepTime
from services.gateway.scheduler.explain import Verdict
from services.gateway.scheduler.replication import SPECULATIVE_WORKERS_MIN
from services.gateway.wire import answers
from tests.fakes.fleet import STARTER, Fleet, FleetWorker, annotation, control, generation

FAR = replace(STARTER, id="far", size_bytes=1_000_000_000)
TENTH = (ReportedStepTime(family="starter", size_class=16, mean_s=0.1),)
NOTHING: frozenset[str] = frozenset()


async def test_a_jobs_estimate_counts_what_is_still_to_come_and_over_which_link(fleet: Fleet) -> None:
    painter = fleet.worker(DIFFUSION, "home", models=(FAR,))
    painter.disk = NOTHING
    painter.worker = replace(painter.worker, takes_fetches=True, goodput_bps=100e6, step_times=TENTH)
    await painter.come()
    job = await fleet.gateway.jobs.create(generation(model="far"))
    estimate = fleet.gateway.explanations.with_estimate(await fleet.get(job)).estimate
    assert estimate is not None
    assert (estimate.node, estimate.fetch_bytes, estimate.link_bps) == ("home", 1_000_000_000, 100e6)
    assert abs(estimate.fetch_s - 80.0) < 1.0
    assert 82.0 < estimate.ready_s < 90.0
    fleet.clock.advance(40.0)
    later = fleet.gateway.explanations.with_estimate(await fleet.get(job)).estimate
    assert later is not None
    assert abs(later.fetch_bytes - 500_000_000) < 20_000_000


async def test_other_calls_are_answered_while_many_jobs_are_estimated(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    turns = 0

    async def somebody_else() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(somebody_else())
    answers = await fleet.gateway.explanations.with_estimates([job, NotFound("no such job")] * 100)
    other.cancel()
    assert [getattr(each, "estimate", "none") is not None for each in answers] == [True] * 200
    assert turns >= 200 / ESTIMATES_AT_A_TIME


async def test_a_worker_is_sent_what_to_prefetch_and_gets_the_task_once_it_has_it(fleet: Fleet) -> None:
    painter = fleet.worker(DIFFUSION, "home", models=(FAR,))
    painter.disk = NOTHING
    painter.worker = replace(painter.worker, takes_fetches=True, goodput_bps=100e6)
    await fleet.gateway.jobs.create(generation(model="far"))
    answer = await fleet.gateway.polls.lease(painter.poll())
    assert not answer.tasks
    assert [(fetch.model, fetch.kind, fetch.size_bytes) for fetch in answer.fetches or ()] == [
        ("far", "checkpoint", 1_000_000_000)
    ]
    assert (await fleet.gateway.polls.lease(painter.poll())).fetches is None
    painter.worker = replace(painter.worker, disk_models=frozenset({"far"}))
    assert len(await painter.lease()) == 1


@pytest.mark.parametrize(("disk_bytes", "told"), [(100_000_000_000, 1), (0, 0)])
async def test_one_of_a_fleet_prefetches_speculatively_where_its_disk_has_room(
    fleet: Fleet, disk_bytes: int, told: int
) -> None:
    answers = []
    for i in range(SPECULATIVE_WORKERS_MIN):
        painter = fleet.worker(DIFFUSION, f"home{i}", models=(FAR,))
        painter.disk = NOTHING
        painter.worker = replace(painter.worker, takes_fetches=True, disk_bytes=disk_bytes)
        answers.append(await fleet.gateway.polls.lease(painter.poll()))
    assert [fetch.model for answer in answers for fetch in answer.fetches or ()] == ["far"] * told


async def test_explaining_lists_workers_that_are_away_or_leaving(fleet: Fleet, painter: FleetWorker) -> None:
    gone, leaving = fleet.worker(DIFFUSION, "gone"), fleet.worker(DIFFUSION, "leaving")
    await gone.come()
    fleet.clock.advance(60.0)
    fleet.gateway._core.workers.retire_silent()
    leaving.worker = replace(leaving.worker, draining=True)
    await leaving.come()
    await painter.come()
    job = await fleet.gateway.jobs.create(generation())
    (task,) = fleet.gateway.explanations.of(await fleet.get(job)).tasks
    assert task.worker == painter.worker.id
    assert {each.node: each.verdict for each in task.workers} == {
        "w": Verdict.PLANNED,
        "gone": Verdict.AWAY,
        "leaving": Verdict.DRAINING,
    }


async def test_a_worker_that_is_away_and_could_do_it_is_named(fleet: Fleet) -> None:
    for name, models in (("able", (STARTER,)), ("unable", (FAR,))):
        await fleet.worker(DIFFUSION, name, models=models).come()
    job = await fleet.gateway.jobs.create(generation())
    fleet.rest()
    explained = fleet.gateway.explanations.of(await fleet.get(job))
    assert explained.summary == ("task 1 waits: no worker of its stage is here; able, which is away, could do it")
    workers = {each.node: (each.why, each.missing) for each in explained.tasks[0].workers}
    assert workers["able"] == ("it has not called lately; it could do it", ())
    assert workers["unable"][0].startswith("it has not called lately, and it lacks checkpoint:starter")
    await fleet.worker(DIFFUSION, "second", models=(STARTER,)).come()
    fleet.rest()
    assert "second, able, which are away, could do it" in fleet.gateway.explanations.of(await fleet.get(job)).summary
    await fleet.worker(DIFFUSION, "able", models=(STARTER,)).come()
    assert "away" not in fleet.gateway.explanations.of(await fleet.get(job)).summary


async def test_an_image_that_waits_for_its_control_image_says_so(
    fleet: Fleet, painter: FleetWorker, annotator: FleetWorker
) -> None:
    job = await fleet.gateway.jobs.create(generation(1, control()))
    found = fleet.gateway.explanations.of(await fleet.get(job))
    assert [task.stage for task in found.tasks] == [PREPROCESS, DIFFUSION]
    assert found.tasks[1].why == "its control images are not made yet"
    assert found.job.estimate is not None
    message = answers.explanation(found)
    assert message.summary == f"task 1 waits: {found.tasks[0].why}"
    assert message.tasks[0].workers[0].verdict == "planned"


async def test_an_ended_job_needs_no_estimate(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    await painter.work()
    found = fleet.gateway.explanations.of(await fleet.get(job))
    assert found.job.estimate is None
    assert found.summary == "it has ended: succeeded"


async def test_a_straggler_is_set_aside_with_a_reason() -> None:
    async with Fleet().running() as fleet:
        quick = [fleet.worker(PREPROCESS, f"q{i}") for i in range(5)]
        slow = fleet.worker(PREPROCESS, "slow")
        for worker in [*quick, slow]:
            worker.worker = replace(worker.worker, device="cuda:small")
        for number in range(12):
            for worker in [*quick, slow]:
                if fleet.gateway.workers.draining_reason(worker.worker.id):
                    continue
                await fleet.gateway.jobs.create(annotation(f"{number} {worker.worker.id}"))
                (task,) = await worker.lease()
                fleet.clock.advance(9.0 if worker is slow else 1.0)
                await worker.complete(task)
        statuses = {status.worker.node: status for status in fleet.gateway.workers.statuses()}
        assert "times as long as those of 4 others of its class" in statuses["slow"].draining_reason
        assert not any(statuses[f"q{i}"].draining_reason for i in range(5))
        await fleet.gateway.jobs.create(annotation())
        assert await slow.lease() == []
        assert len(await quick[0].lease()) == 1
