"""Several gateways over one store: a worker or a client may talk to any of them, and change over in the middle."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from fanlight.errors import LeaseLost
from services.gateway.app.completion import Renewal
from services.gateway.app.watch import FetchStatus, TaskProgress
from services.gateway.config import GatewayLimits
from services.gateway.domain.job import DIFFUSION, PREPROCESS, JobState
from services.gateway.domain.machine import LeaseStatus
from tests.fakes.fleet import Fleet, FleetWorker, control, generation

Pair = tuple[Fleet, Fleet]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with Fleet(is_shared=True).running() as here, here.restarted().running() as there:
        yield here, there


async def told() -> None:
    """Let each gateway hear what the others wrote."""
    for _ in range(20):
        await asyncio.sleep(0)


async def a_task(fleet: Fleet):
    painter = fleet.worker(DIFFUSION)
    await painter.come()
    await fleet.gateway.jobs.create(generation())
    (task,) = await painter.lease()
    return painter, task


async def test_a_lease_renewed_at_one_gateway_is_not_ended_by_another(pair: Pair) -> None:
    here, there = pair
    painter, task = await a_task(here)
    await told()
    for _ in range(10):
        here.clock.advance(here.gateway._leases.ttl_s / 2)
        await here.gateway.queue.renew(painter.worker.id, [Renewal(token=task.token)])
        await here.gateway._core.heartbeats.beat()
        await told()
        await there.gateway.queue.expire_due()
    assert (await there.gateway.queue.renew("w", [Renewal(token=task.token)]))[0].status is LeaseStatus.LIVE


async def test_a_lease_whose_gateway_died_with_its_worker_is_ended_by_another(pair: Pair) -> None:
    here, there = pair
    _, task = await a_task(here)
    await told()
    await there.expire()
    assert (await there.get(task.job)).state is JobState.RUNNING
    await there.expire()
    assert (await there.get(task.job)).state is JobState.QUEUED


async def test_a_worker_renews_and_completes_at_another_gateway(pair: Pair) -> None:
    here, there = pair
    painter, task = await a_task(here)
    assert (await there.gateway.queue.renew("w", [Renewal(token=task.token)]))[0].status is LeaseStatus.LIVE
    painter.fleet = there
    await painter.complete(task)
    await told()
    assert (await here.get(task.job)).state is JobState.SUCCEEDED


async def test_a_token_is_not_refused_because_its_lease_has_not_arrived_yet(pair: Pair) -> None:
    here, there = pair
    painter = here.worker(DIFFUSION)
    await painter.come()
    job = await here.gateway.jobs.create(generation())
    await told()
    # The other gateway holds the job as it was before the lease.
    assert (await there.get(job)).state is JobState.QUEUED
    leasing = asyncio.ensure_future(painter.lease())
    (task,) = await leasing
    painter.fleet = there
    await painter.complete(task)
    assert (await there.get(job)).state is JobState.SUCCEEDED


async def test_a_late_token_is_refused_at_every_gateway(pair: Pair) -> None:
    here, _ = pair
    painter, task = await a_task(here)
    await here.expire()
    for fleet in pair:
        painter.fleet = fleet
        with pytest.raises(LeaseLost):
            await painter.complete(task)


async def test_what_a_worker_offers_is_known_at_every_gateway(pair: Pair) -> None:
    here, there = pair
    await here.worker(DIFFUSION).come()
    await told()
    assert "starter" in [model.id for model in there.gateway.workers.offers.catalog().models.values()]
    assert there.gateway.workers.offers.can_any(DIFFUSION, frozenset({"checkpoint:starter", "controlnet:canny"}))


async def test_a_workers_node_counts_as_live_at_a_gateway_that_only_sees_heartbeats(pair: Pair) -> None:
    here, there = pair
    painter = here.worker(DIFFUSION)
    await painter.come()
    await told()
    assert not any(status.live for status in there.gateway.workers.statuses())
    await here.gateway._core.heartbeats.beat()
    await told()
    assert [status.live for status in there.gateway.workers.statuses()] == [True]


async def test_the_same_request_makes_one_job_wherever_it_is_sent(pair: Pair) -> None:
    requests = [fleet.gateway.jobs.create(generation(request_id="r")) for fleet in (*pair, *pair)]
    jobs = await asyncio.gather(*requests)
    assert len({job.id for job in jobs}) == 1


async def test_a_control_image_made_at_one_gateway_is_found_at_the_other(pair: Pair) -> None:
    here, there = pair
    annotator = here.worker(PREPROCESS)
    await annotator.come()
    await here.gateway.jobs.create(generation(1, control()))
    await annotator.work()
    await told()
    job = await there.gateway.jobs.create(generation(1, control()))
    assert [image.cached for image in job.control_images] == [True]


async def test_a_client_watches_at_one_gateway_what_a_worker_does_at_another(pair: Pair) -> None:
    here, there = pair
    job = await here.gateway.jobs.create(generation())
    events = there.gateway.jobs.watch(job.name)
    states = [(await anext(events)).state]
    painter: FleetWorker = here.worker(DIFFUSION)
    (task,) = await painter.lease()
    states.append((await anext(events)).state)
    said = TaskProgress(task=0, step=2, steps=9)
    await here.gateway.queue.renew(painter.worker.id, [Renewal(token=task.token, progress=said)])
    await here.gateway._core.heartbeats.beat()
    await told()
    assert (await there.get(job)).tasks[0].step == 2
    await painter.complete(task)
    states += [event.state async for event in events]
    assert states == [JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED]


async def test_a_watch_goes_on_at_another_gateway_after_the_last_state_it_saw(pair: Pair) -> None:
    here, there = pair
    painter = here.worker(DIFFUSION)
    await painter.come()
    job = await here.gateway.jobs.create(generation())
    events = here.gateway.jobs.watch(job.name)
    seen = [await anext(events)]
    (task,) = await painter.lease()
    seen.append(await anext(events))
    # Its gateway dies; the number of the last state is worth as much at the other one.
    await events.aclose()
    await told()
    again = there.gateway.jobs.watch(job.name, after_revision=seen[-1].revision)
    following = asyncio.ensure_future(anext(again))
    await told()
    assert not following.done()
    painter.fleet = there
    await painter.complete(task)
    assert (await following).state is JobState.SUCCEEDED
    assert [event.state for event in seen] == [JobState.QUEUED, JobState.RUNNING]


async def test_a_circuit_breaker_open_at_one_gateway_is_open_at_the_other(pair: Pair) -> None:
    here, there = pair
    broken = here.worker(DIFFUSION, "broken")
    for _ in range(2):
        await here.gateway.jobs.create(generation())
        (task,) = await broken.lease()
        await broken.fail(task)
    await told()
    (breaker,) = there.gateway._core.circuit_breakers.open("broken", DIFFUSION, "")
    assert breaker.key.need == "checkpoint:starter"


async def test_a_download_that_another_gateway_hears_of_is_progress_here_too() -> None:
    fleet = Fleet(is_shared=True, limits=GatewayLimits(stall_first_s=200.0))
    async with fleet.running() as here, here.restarted().running() as there:
        painter, task = await a_task(here)
        await told()
        for megabytes in (*range(1, 50), *[50] * 19):
            fetch = FetchStatus(
                reference="sd15",
                done_bytes=megabytes * 10**6,
                total_bytes=10**9,
                goodput_bps=1e6,
                seconds_left=None,
                source="hub.example",
            )
            said = TaskProgress(task=0, step=0, steps=0, fetching=fetch)
            await here.gateway.queue.renew(painter.worker.id, [Renewal(token=task.token, progress=said)])
            await here.gateway._core.heartbeats.beat()
            await told()
            here.clock.advance(10)
            await there.gateway.queue.expire_due()
        assert (await there.get(task.job)).state is JobState.RUNNING
        here.clock.advance(10)
        await there.gateway.queue.expire_due()
        failure = (await there.get(task.job)).tasks[0].failure
        assert failure is not None
        assert failure.reason == "STALLED"


async def test_a_store_that_answers_with_an_old_record_is_read_again(pair: Pair, monkeypatch) -> None:
    here, there = pair
    painter, task = await a_task(here)
    old = await here.store.get("jobs", task.job.id)
    await painter.complete(task)
    await told()
    answers = [old]
    get = here.store.get

    async def lagging(bucket: str, key: str):
        return answers.pop() if bucket == "jobs" and answers else await get(bucket, key)

    monkeypatch.setattr(here.store, "get", lagging)
    events = [event.state async for event in there.gateway.jobs.watch(task.job.name)]
    assert events == [JobState.SUCCEEDED]


async def test_a_gateway_alone_keeps_no_list_of_workers_for_heartbeats() -> None:
    fleet = Fleet()
    async with fleet.running():
        heartbeats = fleet.gateway._core.heartbeats
        await fleet.worker(DIFFUSION, "here").come()
        await fleet.gateway.queue.renew("gone", [])
        await heartbeats.sweep()
        assert heartbeats._callers == {"here-diffusion"}
