"""A store that is away, full or slow; a clock that jumps; a blob budget that is used up; a cache over its budget."""

import pytest

from fanlight.contract.names import digest_of
from fanlight.errors import FailedPrecondition, LeaseLost, NotFound, Unavailable
from services.gateway.adapters.sqlite_store import TimeoutStore
from services.gateway.app.completion import Renewal, ReportedOutput
from services.gateway.app.control_cache import BUCKET
from services.gateway.app.job_store import PROBE_INTERVAL_S
from services.gateway.domain.job import DIFFUSION, PREPROCESS, JobState
from services.gateway.domain.machine import LeaseStatus
from services.kernel.errors_wire import http_status
from tests.fakes.fleet import STARTER, Fleet, FleetWorker, annotation, control, generation, result
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.moody_store import MoodyStore


@pytest.mark.parametrize("mood", ["is_away", "is_full"])
async def test_while_the_store_accepts_no_writes_new_jobs_are_refused_and_accepted_ones_survive(mood: str) -> None:
    store = MoodyStore()
    async with Fleet(store=store).running() as fleet:
        painter = fleet.worker(DIFFUSION)
        job = await fleet.gateway.jobs.create(generation(2))
        (task,) = await painter.lease()
        setattr(store, mood, True)
        with pytest.raises(Unavailable) as refused:
            await fleet.gateway.jobs.create(generation())
        assert (http_status(refused.value), refused.value.retry_after_s) == (503, 2.0)
        # The lease lives on, and its result may be handed in again until it is taken.
        (answer,) = await fleet.gateway.queue.renew("w", [Renewal(token=task.token)])
        assert answer.status is LeaseStatus.LIVE
        with pytest.raises(Unavailable):
            await painter.complete(task)
        setattr(store, mood, False)
        await painter.complete(task)
        assert await painter.work() == 1
        assert (await fleet.get(job)).state is JobState.SUCCEEDED


async def test_a_store_that_hangs_is_away_after_a_time() -> None:
    store = MoodyStore()
    store.hangs = True
    with pytest.raises(Unavailable) as refused:
        await TimeoutStore(store, timeout_s=0.05).get("jobs", "a")
    assert refused.value.retry_after_s


async def test_a_clock_that_jumps_forward_deletes_nothing(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    await painter.work()
    fleet.clock.jump(30 * 86_400)
    await fleet.gateway.sweep()
    assert (await fleet.get(job)).state is JobState.SUCCEEDED
    fleet.clock.advance(2 * 3_600)
    await fleet.gateway.sweep()
    with pytest.raises(NotFound):
        await fleet.get(job)


async def test_a_clock_that_jumps_ends_no_lease(fleet: Fleet, painter: FleetWorker) -> None:
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    for jump_s in (86_400, -200_000):
        fleet.clock.jump(jump_s)
        await fleet.gateway.queue.expire_due()
    await painter.complete(task)


async def test_a_worker_that_lies_about_its_token_changes_nothing(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    lies = [
        "",
        "x",
        f"{job.id}.1.",
        f"{job.id}.1.00",
        task.token[:-1],
        task.token + "0",
        task.token.replace(".1.", ".2."),
    ]
    for lie in lies:
        with pytest.raises(LeaseLost):
            await fleet.gateway.queue.complete(lie, [], [])
        with pytest.raises(LeaseLost):
            await fleet.gateway.queue.give_back(lie)
    assert (await fleet.get(job)).state is JobState.RUNNING


async def test_a_task_cannot_be_completed_with_a_missing_blob(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    missing = ReportedOutput(scope="default", digest=digest_of(b"nothing"), width_px=8, height_px=8)
    with pytest.raises(FailedPrecondition):
        await fleet.gateway.queue.complete(task.token, [missing], [])
    assert (await fleet.get(job)).state is JobState.RUNNING


async def test_a_blob_budget_that_is_nearly_used_up_makes_room_early() -> None:
    fleet = Fleet(settings={"blob_budget_bytes": 1_000})
    fleet.blobs = MemoryBlobs(budget_bytes=1_000, now_s=fleet.clock.now_s)
    fleet.__post_init__()
    async with fleet.running():
        old = fleet.blobs.put(b"o" * 500)
        fleet.clock.advance(2 * 86_400)
        young = fleet.blobs.put(b"y" * 400)
        await fleet.gateway.sweep()
        assert await fleet.blobs.stat("default", old.digest) is None
        assert await fleet.blobs.stat("default", young.digest) is not None
        # What was used lately stays, however full it is.
        fleet.blobs.put(b"z" * 500)
        await fleet.gateway.sweep()
        assert fleet.blobs.used_bytes == 900


async def test_the_cache_stays_within_its_bytes_and_counts_its_hits() -> None:
    async with Fleet(settings={"cache_budget_bytes": 250}).running() as fleet:
        annotator = fleet.worker(PREPROCESS)
        await annotator.come()
        for name in ("a", "b", "a", "c", "d"):
            await fleet.gateway.jobs.create(annotation(name, side_px=STARTER.width_px))
            for task in await annotator.lease():
                await annotator.complete(task, image=name.encode() * (100 - len(result(64, 64, b""))))
        figures = fleet.gateway.cache_figures
        assert (figures.hits, figures.misses) == (1, 4)
        assert (figures.entries, figures.size_bytes) == (2, 200)
        assert len(await fleet.store.list(BUCKET, limit=9)) == 2
        job = await fleet.gateway.jobs.create(generation(1, control(name="d")))
        assert job.control_images[0].cached


async def test_a_gateway_whose_store_takes_no_writes_should_be_sent_no_requests() -> None:
    store = MoodyStore()
    async with Fleet(store=store).running() as fleet:
        await fleet.gateway.probe.write()
        store.is_full = True
        # Who asks often costs no write each time.
        await fleet.gateway.probe.write()
        fleet.clock.advance(PROBE_INTERVAL_S + 1)
        with pytest.raises(Unavailable):
            await fleet.gateway.probe.write()
        store.is_full = False
        await fleet.gateway.probe.write()
