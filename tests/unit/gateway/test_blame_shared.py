"""Several gateways over one store agree on what is broken where, on sources that are away, and on second opinions."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from fanlight.contract.names import ANY
from services.gateway.app.second_opinions import OPINION_WAIT_S
from services.gateway.domain.job import DIFFUSION, Failure, Fault, JobState
from services.gateway.domain.workers import AnnouncedModel
from tests.fakes.fleet import CRASH, STARTER, Fleet, FleetWorker, generation

WRONG = Failure(reason="INVALID_FIELD", message="I do not like it", field="prompt")
MODEL = "hf:org/model"
OFFERS = (STARTER, AnnouncedModel(id=ANY, kind="checkpoint"))

Pair = tuple[Fleet, Fleet]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with Fleet(is_shared=True).running() as here, here.restarted().running() as there:
        yield here, there


async def told(*fleets: Fleet) -> None:
    """Let each gateway hear what the others wrote, and which workers called them."""
    for fleet in fleets:
        await fleet.gateway._core.heartbeats.beat()
    for _ in range(30):
        await asyncio.sleep(0)


async def a_node(fleet: Fleet, name: str) -> FleetWorker:
    worker = fleet.worker(DIFFUSION, name, models=OFFERS)
    worker.disk = frozenset({"starter"})
    await worker.come()
    return worker


async def test_the_second_opinion_may_come_from_a_worker_of_another_gateway(pair: Pair) -> None:
    here, there = pair
    first, second = await a_node(here, "a"), await a_node(there, "b")
    await told(here, there)
    job = await here.gateway.jobs.create(generation())
    (task,) = await first.lease()
    await first.fail(task, Fault.REQUEST, WRONG)
    assert (await here.get(job)).state is JobState.QUEUED
    await told(here, there)
    assert await second.work() == 1
    await told(here, there)
    assert (await here.get(job)).state is JobState.SUCCEEDED
    (record,) = await here.store.list("faults", limit=9)
    assert record.key == "a"


async def test_another_gateway_ends_the_wait_for_an_opinion_when_the_first_one_is_gone() -> None:
    async with Fleet(is_shared=True).running() as there:
        async with there.restarted().running() as here:
            first, _ = await a_node(here, "a"), await a_node(here, "b")
            job = await here.gateway.jobs.create(generation())
            (task,) = await first.lease()
            await first.fail(task, Fault.REQUEST, WRONG)
            await told(here, there)
        there.clock.advance(OPINION_WAIT_S)
        await there.gateway.queue.end_unconfirmed()
        assert (await there.get(job)).state is JobState.FAILED


async def test_twelve_images_that_fail_at_two_gateways_count_once(pair: Pair) -> None:
    here, there = pair
    node, _ = await a_node(here, "a"), await a_node(here, "b")
    await told(here, there)
    await here.gateway.jobs.create(generation(12))
    tasks = await node.lease(limit=16)
    await told(here, there)
    for number, task in enumerate(tasks):
        await (here, there)[number % 2].gateway.queue.fail(
            task.token, Fault.NODE, replace(CRASH, part="checkpoint:starter")
        )
    (record,) = await here.store.list("faults", limit=9)
    assert len(tasks) > 2
    assert b'"count":1' in record.value


async def test_a_source_that_is_away_is_known_to_all_gateways(pair: Pair) -> None:
    here, there = pair
    node = await a_node(here, "a")
    await told(here, there)
    jobs = [await here.gateway.jobs.create(generation(model=MODEL)) for _ in range(2)]
    (task,) = await node.lease()
    await node.fail(task, Fault.NODE, Failure(reason="UNAVAILABLE", message="away", part="source:hub.example"))
    await told(here, there)
    node.fleet = there
    assert await node.lease() == []
    summary = there.gateway.explanations.of(await there.get(jobs[1])).summary
    assert "hub.example could not be reached" in summary
