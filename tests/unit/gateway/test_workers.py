"""Which workers are known and live, and what is remembered of those that left."""

from dataclasses import replace

import pytest

from fanlight.errors import ResourceExhausted
from services.gateway.config import GatewayLimits
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.workers import Capabilities
from tests.fakes.fleet import CANNY, STARTER, Fleet, FleetWorker, generation


async def test_a_worker_that_stops_polling_is_no_longer_live_but_listed(fleet: Fleet, painter: FleetWorker) -> None:
    assert [status.live for status in fleet.gateway.workers.statuses()] == [True]
    fleet.clock.advance(31)
    assert [status.live for status in fleet.gateway.workers.statuses()] == [False]
    fleet.clock.advance(600)
    assert fleet.gateway.workers.statuses() == []


async def test_what_a_worker_offered_is_remembered_for_a_while(fleet: Fleet, painter: FleetWorker) -> None:
    fleet.clock.advance(3_600)
    await fleet.gateway.sweep()
    assert ("checkpoint", "starter", "starter") in fleet.gateway.workers.offers.catalog().models
    fleet.clock.advance(86_400)
    await fleet.gateway.sweep()
    assert fleet.gateway.workers.offers.catalog().models == {}
    assert await fleet.store.list("workers", limit=10) == []


async def test_a_worker_that_renews_is_live(fleet: Fleet, painter: FleetWorker) -> None:
    fleet.clock.advance(29)
    await fleet.gateway.queue.renew(painter.worker.id, [])
    fleet.clock.advance(29)
    assert fleet.gateway.workers.statuses()[0].live


async def test_a_worker_is_listed_with_its_tasks(fleet: Fleet, painter: FleetWorker) -> None:
    job = await fleet.gateway.jobs.create(generation())
    await painter.lease()
    assert fleet.gateway.workers.statuses()[0].tasks == (f"{job.name}/tasks/1",)


async def test_of_two_descriptions_the_live_workers_counts(fleet: Fleet) -> None:
    old = fleet.worker(PREPROCESS, "old", annotators=(CANNY,))
    await old.come()
    fleet.clock.advance(60)
    new = fleet.worker(PREPROCESS, "new", annotators=(replace(CANNY, version="2"),))
    await new.come()
    assert fleet.gateway.workers.offers.catalog().annotators["canny"].version == "2"
    assert [each.version for each in fleet.gateway.workers.offers.variants("canny")] == ["2", "1"]


async def test_capabilities_that_change_are_taken_in(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION, models=(STARTER,))
    await worker.come()
    worker.capabilities = Capabilities(models=(replace(STARTER, id="new"),))
    await worker.come()
    assert {model_id for _, model_id, *_ in fleet.gateway.workers.offers.catalog().models} == {"new"}
    async with fleet.restarted().running() as again:
        assert {model_id for _, model_id, *_ in again.gateway.workers.offers.catalog().models} == {"new"}


async def test_workers_are_bounded_and_the_one_away_longest_makes_room() -> None:
    async with Fleet(limits=GatewayLimits(worker_limit=2)).running() as fleet:
        await fleet.worker(DIFFUSION, "a").come()
        fleet.clock.advance(40)
        await fleet.worker(DIFFUSION, "b").come()
        await fleet.worker(DIFFUSION, "c").come()
        assert {status.worker.node for status in fleet.gateway.workers.statuses()} == {"b", "c"}
        with pytest.raises(ResourceExhausted):
            await fleet.worker(DIFFUSION, "d").come()


async def test_polls_are_not_written_one_by_one(fleet: Fleet, painter: FleetWorker) -> None:
    (before,) = await fleet.store.list("workers", limit=10)
    for _ in range(5):
        fleet.clock.advance(1)
        await painter.come()
    assert await fleet.store.list("workers", limit=10) == [before]
    fleet.clock.advance(60)
    await painter.come()
    assert await fleet.store.list("workers", limit=10) != [before]
