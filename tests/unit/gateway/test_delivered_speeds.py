"""What a worker delivers counts, not what it claims."""

from dataclasses import replace

import pytest

from services.gateway.app.capabilities import DELIVERED_CLASSES_LIMIT, LINK_OFF, WorkerViews
from services.gateway.app.worker_registry import MEASURED_S
from services.gateway.domain.job import DIFFUSION, Facts
from services.gateway.domain.workers import AnnouncedModel, ReportedStepTime, Worker
from services.gateway.scheduler.pace import DELIVERED_MIN, Delivered, delivered_times
from tests.fakes.fleet import STARTER, Fleet, FleetWorker, generation
from tests.unit.gateway.test_step_times import NOTHING

SMALL, LARGE = ("sd1", 18), ("sd1", 20)
FACTS = Facts(family="sd1", width_px=512, height_px=512, steps=20)


def test_claims_count_until_a_few_tasks_were_measured() -> None:
    delivered = Delivered()
    for _ in range(DELIVERED_MIN - 1):
        delivered.note(5.0)
    assert (delivered.least, delivered.largest) == (0.0, 0.0)
    delivered.note(4.0)
    assert (delivered.least, delivered.largest) == (4.0, 5.0)
    for _ in range(8):
        delivered.note(9.0)
    assert delivered.least == 9.0, "the latest count"


def test_where_nothing_was_measured_the_other_claims_are_off_by_as_much() -> None:
    claimed = {SMALL: 0.01, LARGE: 0.04}
    assert delivered_times(claimed, {}) == claimed
    assert delivered_times(claimed, {SMALL: 0.1}) == pytest.approx({SMALL: 0.1, LARGE: 0.4})
    assert delivered_times(claimed, {SMALL: 0.005}) == {SMALL: 0.005, LARGE: 0.04}, "nobody claims too little"


def seen(views: WorkerViews, *claimed: float, goodput_bps: float = 0.0) -> Worker:
    times = tuple(ReportedStepTime(family="sd1", size_class=18, mean_s=each) for each in claimed)
    return Worker(id="w", node="n", stage=DIFFUSION, step_times=times, goodput_bps=goodput_bps)


def test_a_worker_that_loads_and_fetches_now_and_then_is_as_quick_as_its_best_tasks() -> None:
    views = WorkerViews()
    for took_s in (60.0, 2.5, 9.0, 2.6):
        views.note_task("w", FACTS, took_s)
    view = views.of(seen(views, 0.1), NOTHING, frozenset())
    assert view.step_times == {SMALL: pytest.approx((2.5 - 0.5) / 20)}


def test_a_link_is_at_most_a_little_more_than_its_fetches_got() -> None:
    views = WorkerViews()
    claims = seen(views, goodput_bps=1e9)
    assert views.of(claims, NOTHING, frozenset()).link_bps == 1e9
    for took_s in (10.0, 12.0, 40.0):
        views.note_fetch("w", 12_500_000, took_s)
    assert views.of(claims, NOTHING, frozenset()).link_bps == LINK_OFF * 10e6
    honest = replace(claims, goodput_bps=12e6)
    assert WorkerViews().of(honest, NOTHING, frozenset()).link_bps == 12e6


def test_so_many_sizes_are_measured_and_forgotten_with_the_worker() -> None:
    views = WorkerViews()
    for number in range(DELIVERED_CLASSES_LIMIT + 9):
        for _ in range(DELIVERED_MIN):
            views.note_task("w", replace(FACTS, family=f"f{number}"), 3.0)
    assert len(views.of(seen(views), NOTHING, frozenset()).step_times) == DELIVERED_CLASSES_LIMIT
    views.forget("w")
    assert views.of(seen(views), NOTHING, frozenset()).step_times == {}


def test_what_says_nothing_is_not_measured() -> None:
    views = WorkerViews()
    for facts, took_s in ((Facts(), 3.0), (replace(FACTS, steps=0), 3.0), (FACTS, 0.0), (FACTS, -9.0)):
        for _ in range(DELIVERED_MIN):
            views.note_task("w", facts, took_s)
    assert views.of(seen(views), NOTHING, frozenset()).step_times == {}


async def do_one(fleet: Fleet, workers: dict[str, FleetWorker], takes_s: dict[str, float]) -> str:
    """Who did it: all poll, the scheduler chooses."""
    job = await fleet.gateway.jobs.create(generation(steps=20))
    for name, worker in workers.items():
        for task in await worker.lease():
            fleet.clock.advance(takes_s[name])
            await worker.complete(task)
            assert task.job.id == job.id
            return name
    raise AssertionError("nobody took it")


async def test_who_claims_much_and_delivers_little_loses(fleet: Fleet) -> None:
    claims = {"honest": 0.2, "liar": 0.001}
    takes_s = {"honest": 4.5, "liar": 40.0}
    workers = {}
    for name, mean_s in claims.items():
        workers[name] = fleet.worker(DIFFUSION, name)
        times = (ReportedStepTime(family="starter", size_class=16, mean_s=mean_s),)
        workers[name].worker = replace(workers[name].worker, step_times=times, vram_models=frozenset({"starter"}))
        await workers[name].come()
    done = [await do_one(fleet, workers, takes_s) for _ in range(12)]
    assert done[0] == "liar"
    assert set(done[-6:]) == {"honest"}
    view = fleet.gateway._core.scheduler.worker("liar-diffusion").view
    assert view.step_times[("starter", 16)] == pytest.approx((40.0 - 0.5) / 20)
    fleet.clock.advance(MEASURED_S + 1.0)
    await workers["liar"].come()
    view = fleet.gateway._core.scheduler.worker("liar-diffusion").view
    assert view.step_times[("starter", 16)] < 1.0, "after a while it may show that it is quicker now"


async def test_what_is_held_sooner_or_later_after_it_was_to_be_fetched_shows_the_link(fleet: Fleet) -> None:
    models = tuple(AnnouncedModel(id=f"m{i}", kind="lora", family="starter", size_bytes=10_000_000) for i in range(4))
    worker = fleet.worker(DIFFUSION, models=(STARTER, *models))
    worker.disk = frozenset({"starter"})
    worker.worker = replace(worker.worker, takes_fetches=True, goodput_bps=1e9)
    await worker.come()
    for i, model in enumerate(models):
        prompt = f"a fox <lora:{model.id}:1>"
        await fleet.gateway.jobs.create(generation(prompt=prompt, workers=fleet.gateway.workers.offers))
        answer = await fleet.gateway.polls.lease(worker.poll(limit=0))
        assert [each.model for each in answer.fetches or ()] == [model.id]
        fleet.clock.advance(8.0)
        worker.disk |= {model.id}
        await worker.come()
        view = fleet.gateway._core.scheduler.worker(worker.worker.id).view
        assert view.link_bps == (1e9 if i < 2 else LINK_OFF * 10e6)
