"""Leases that are renewed while their tasks come no further: what counts as progress, and when they are lost."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

import pytest

from services.gateway.app.completion import Renewal
from services.gateway.app.leasing import LeasedTask
from services.gateway.app.watch import FetchStatus, TaskProgress
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Ending, JobState
from services.gateway.domain.progress import REFERENCES_LIMIT, LeaseProgress, Phase, StallLimits
from services.gateway.domain.workers import ReportedStepTime
from tests.fakes.fleet import Fleet, FleetWorker, annotation, generation

LIMITS = StallLimits(factor=40.0, floor_s=120.0, first_s=1_800.0, longest_s=3_600.0)
EVERY_S = 10.0


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as fleet:
        yield fleet


def at(step: int, steps: int = 20) -> TaskProgress:
    return TaskProgress(task=0, step=step, steps=steps)


def fetching(done_bytes: int, *, reference: str = "sd15", total_bytes: int = 10**9) -> TaskProgress:
    status = FetchStatus(
        reference=reference,
        done_bytes=done_bytes,
        total_bytes=total_bytes,
        goodput_bps=1e6,
        seconds_left=None,
        source="hub.example",
    )
    return TaskProgress(task=0, step=0, steps=0, fetching=status)


async def leased(fleet: Fleet, *, mean_s: float = 0.0, slots: int = 1) -> tuple[FleetWorker, LeasedTask]:
    """A diffusion task at a worker that measured so many seconds for an evaluation of its size; 0: it did not."""
    painter = fleet.worker(DIFFUSION)
    times = (ReportedStepTime(family="starter", size_class=16, mean_s=mean_s),) if mean_s else ()
    painter.worker = replace(painter.worker, step_times=times, slots=slots)
    await painter.come()
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    return painter, task


async def renewed(fleet: Fleet, task: LeasedTask, reports: Iterable[TaskProgress]) -> float:
    """For how long the lease was held while these were reported, one in ten seconds."""
    held_s = 0.0
    for each in reports:
        await fleet.gateway.queue.renew("w", [Renewal(token=task.token, progress=each)])
        fleet.clock.advance(EVERY_S)
        await fleet.gateway.queue.expire_due()
        if (await fleet.get(task.job)).state is not JobState.RUNNING:
            return held_s
        held_s += EVERY_S
    return held_s


@pytest.mark.parametrize(
    ("mean_s", "slots", "limit_s"), [(0.1, 1, 120.0), (5.0, 1, 200.0), (5.0, 2, 400.0), (0.0, 1, 1_800.0)]
)
async def test_a_step_that_never_ends_loses_the_lease_by_the_workers_own_time(
    fleet: Fleet, mean_s: float, slots: int, limit_s: float
) -> None:
    _, task = await leased(fleet, mean_s=mean_s, slots=slots)
    assert await renewed(fleet, task, [at(7)] * 1_000) == limit_s - EVERY_S
    lost = (await fleet.get(task.job)).tasks[0]
    assert lost.failure is not None
    assert lost.failure.reason == "STALLED"
    assert f"no progress for {limit_s:.0f} s, at step 7 of 20" in lost.failure.message
    # As a worker that vanished: the task is not spent after three.
    assert [each.ending for each in lost.attempts] == [Ending.LOST]


@pytest.mark.parametrize(
    "reports",
    [
        [at(5), at(3)],
        [at(5), at(5, 30), at(5, 40)],
        [at(5), fetching(1), fetching(2)],
        [at(900, 1_000), at(901, 1_000), at(902, 1_000)],
        [at(20), at(21), at(22)],
    ],
    ids=["back and forth", "more steps", "a download after a step", "beyond its evaluations", "beyond its own steps"],
)
async def test_what_was_reached_before_is_no_progress(fleet: Fleet, reports: list[TaskProgress]) -> None:
    _, task = await leased(fleet, mean_s=0.1)
    assert await renewed(fleet, task, reports * 1_000) < 2_000.0


async def test_progress_that_goes_back_and_forth_is_lost_as_soon_as_none(fleet: Fleet) -> None:
    _, task = await leased(fleet, mean_s=0.1)
    assert await renewed(fleet, task, [at(5), at(3)] * 1_000) == 110.0


async def test_a_slow_worker_that_comes_further_keeps_its_lease(fleet: Fleet) -> None:
    _, task = await leased(fleet, mean_s=100.0)
    assert await renewed(fleet, task, [at(1 + number // 11) for number in range(200)]) == 2_000.0


async def test_a_download_that_stalls_at_the_same_bytes_is_lost_and_one_that_goes_on_is_not(fleet: Fleet) -> None:
    _, task = await leased(fleet, mean_s=0.1)
    coming = [fetching(number * 10**6) for number in range(300)]
    assert await renewed(fleet, task, coming) == 3_000.0
    assert await renewed(fleet, task, [coming[-1]] * 1_000) == 1_790.0 - EVERY_S


async def test_downloads_that_take_turns_are_progress_only_where_their_bytes_grow(fleet: Fleet) -> None:
    _, task = await leased(fleet)
    turns = [fetching(10**6), fetching(10**6, reference="lora"), fetching(0), fetching(10**5, reference="lora")]
    assert await renewed(fleet, task, turns * 1_000) == 1_800.0


async def test_a_task_that_waits_while_its_worker_works_on_others_is_waited_for_but_not_for_ever(fleet: Fleet) -> None:
    painter, waiting = await leased(fleet, mean_s=10.0, slots=2)
    await fleet.gateway.jobs.create(generation())
    (running,) = await painter.lease()
    held_s = 0.0
    for number in range(1_000):
        # An image of very many steps, one in a hundred seconds.
        said = Renewal(token=running.token, progress=at(1 + number // 10, 1_000)), Renewal(token=waiting.token)
        await fleet.gateway.queue.renew("w", said)
        fleet.clock.advance(EVERY_S)
        await fleet.gateway.queue.expire_due()
        if (await fleet.get(waiting.job)).state is not JobState.RUNNING:
            break
        held_s += EVERY_S
    assert held_s > 1_800.0
    assert held_s < 3_600.0


async def test_an_annotation_that_never_ends_loses_its_lease(fleet: Fleet) -> None:
    annotator = fleet.worker(PREPROCESS)
    await annotator.come()
    await fleet.gateway.jobs.create(annotation())
    (task,) = await annotator.lease()
    assert await renewed(fleet, task, [TaskProgress(task=0, step=0, steps=0)] * 1_000) == 1_790.0


async def test_a_gateway_that_stood_still_counts_no_stall(fleet: Fleet) -> None:
    _, task = await leased(fleet, mean_s=0.1)
    await renewed(fleet, task, [at(7)])
    fleet.clock.advance(86_400.0)
    fleet.gateway._leases.postpone(86_400.0)
    await fleet.gateway.queue.expire_due()
    assert (await fleet.get(task.job)).state is JobState.RUNNING


def test_phases_follow_the_furthest_step() -> None:
    begun = LeaseProgress()
    assert begun.phase is Phase.BEGINNING
    assert begun.at_bytes("sd15", 10, 10).phase is Phase.BEGINNING
    evaluating = begun.at_step(3, 9)
    assert evaluating.phase is Phase.EVALUATING
    assert evaluating.at_step(1, 9).phase is Phase.EVALUATING
    assert evaluating.at_step(9, 9).phase is Phase.FINISHING


def test_so_many_references_count_and_no_more() -> None:
    progress = LeaseProgress()
    for number in range(REFERENCES_LIMIT + 10):
        progress = progress.at_bytes(f"model-{number}", 1, 0)
    assert len(progress.fetched) == progress.fetched_bytes == REFERENCES_LIMIT


def test_bytes_beyond_the_total_do_not_count() -> None:
    assert LeaseProgress().at_bytes("sd15", 500, 100).fetched_bytes == 100
    assert LeaseProgress().at_bytes("sd15", 500, 0).fetched_bytes == 500


@pytest.mark.parametrize(("evaluation_s", "limit_s"), [(None, 1_800.0), (1.0, 120.0), (10.0, 400.0), (1e9, 3_600.0)])
def test_what_a_worker_reports_bounds_no_lease_beyond_the_longest(evaluation_s: float | None, limit_s: float) -> None:
    progress = LeaseProgress().at_step(1, 9)
    assert LIMITS.limit_s(progress, evaluation_s=evaluation_s, slots=1) == limit_s
