"""Slow targets: a limit of concurrent attempts, each delivery once, and the others when there is room."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from services.gateway.app import webhooks as module
from services.gateway.app.job_store import JOBS
from services.gateway.app.records import Records
from services.gateway.app.webhooks import SENDING_LIMIT_EACH, WebhookOptions, Webhooks
from services.gateway.domain import machine
from services.gateway.domain.delivery import BACKOFF_S, CLAIM_S, DeliveryState
from services.gateway.domain.job import Job
from tests.fakes.fleet import CountingBytes, FakeClock, Fleet, generation
from tests.fakes.memory_store import MemoryStore

MORE = 5
COUNT = SENDING_LIMIT_EACH + MORE


class SlowTarget:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.open = 0
        self.most = 0
        self.ids: list[str] = []

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        self.ids.append(headers["webhook-id"])
        self.open += 1
        self.most = max(self.most, self.open)
        await self.answers.wait()
        self.open -= 1
        return 204


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def ended_jobs(store: MemoryStore, count: int) -> list[Job]:
    async with Fleet().running() as fleet:
        await fleet.worker("diffusion").come()
        job = await fleet.gateway.jobs.create(generation())
    ended = machine.cancel(replace(job, webhook_url="https://hooks.example/"), now_s=2.0)
    jobs = [replace(ended, id=f"{job.id}-{number}") for number in range(count)]
    for each in jobs:
        await store.create("jobs", each.id, JOBS.encode(each))
    return jobs


@asynccontextmanager
async def telling(store: MemoryStore, target: SlowTarget, clock: FakeClock) -> AsyncIterator[Webhooks]:
    webhooks = Webhooks(Records(store, clock), clock, CountingBytes(0))
    webhooks.use(WebhookOptions(sender=target, payload=lambda job: b"{}", default_key=b"k" * 32))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(webhooks.follow())
        await settled()
        yield webhooks
        store.close()


async def test_concurrent_attempts_are_limited_and_the_others_follow() -> None:
    store, target, clock = MemoryStore(), SlowTarget(), FakeClock()
    async with telling(store, target, clock) as webhooks, asyncio.TaskGroup() as group:
        jobs = await ended_jobs(store, COUNT)
        for job in jobs:
            webhooks.observe(job)
        for _ in range(3):
            await webhooks.run(group)
            await settled()
        assert (target.open, len(target.ids)) == (SENDING_LIMIT_EACH, SENDING_LIMIT_EACH)
        target.answers.set()
        await settled()
        await webhooks.run(group)
        await settled()
        assert (target.most, len(target.ids), len(set(target.ids))) == (SENDING_LIMIT_EACH, COUNT, COUNT)
        states = {(await webhooks.get(job)).state for job in jobs}
        assert states == {DeliveryState.DELIVERED}


async def test_a_running_attempt_is_not_repeated_although_its_claim_runs_out() -> None:
    store, target, clock = MemoryStore(), SlowTarget(), FakeClock()
    async with telling(store, target, clock) as webhooks, asyncio.TaskGroup() as group:
        (job,) = await ended_jobs(store, 1)
        webhooks.observe(job)
        await webhooks.run(group)
        await settled()
        clock.advance(CLAIM_S + 1.0)
        await webhooks.run(group)
        await settled()
        assert len(target.ids) == 1
        target.answers.set()


async def test_more_ended_jobs_than_may_be_pending_are_not_noted(monkeypatch) -> None:
    monkeypatch.setattr(module, "PENDING_LIMIT", 2)
    store, target, clock = MemoryStore(), SlowTarget(), FakeClock()
    target.answers.set()
    async with telling(store, target, clock) as webhooks, asyncio.TaskGroup() as group:
        for job in await ended_jobs(store, 3):
            webhooks.observe(job)
        await webhooks.run(group)
        await settled()
        assert len(target.ids) == 2


async def test_targets_that_hang_hold_up_no_other_tenants_webhooks() -> None:
    store, target, clock = MemoryStore(), SlowTarget(), FakeClock()
    async with telling(store, target, clock) as webhooks, asyncio.TaskGroup() as group:
        slow = await ended_jobs(store, 10 * SENDING_LIMIT_EACH)
        for job in slow:
            webhooks.observe(job)
        await webhooks.run(group)
        await settled()
        other = replace(slow[0], id=f"{slow[0].id}-other", tenant="other")
        await store.create("jobs", other.id, JOBS.encode(other))
        webhooks.observe(other)
        assert (webhooks.count_of("other"), webhooks.count_of("default")) == (1, 10 * SENDING_LIMIT_EACH)
        for _ in range(2):
            await webhooks.run(group)
            await settled()
        assert sum("-other" in each for each in target.ids) == 1
        target.answers.set()
        await settled()
        assert webhooks.count_of("other") == 0
        assert not webhooks.is_open(other.id)


async def test_a_deleted_delivery_is_counted_no_more() -> None:
    store, target, clock = MemoryStore(), SlowTarget(), FakeClock()
    async with telling(store, target, clock) as webhooks, asyncio.TaskGroup() as group:
        (job,) = await ended_jobs(store, 1)
        webhooks.observe(job)
        assert webhooks.is_open(job.id)
        await webhooks.run(group)
        target.answers.set()
        await settled()
        await webhooks.forget(job)
        await settled()
        assert not webhooks._open
        assert not webhooks._counts


async def test_a_job_that_is_deleted_as_it_ends_is_not_told_of() -> None:
    store, target, clock = MemoryStore(), SlowTarget(), FakeClock()
    target.answers.set()
    async with telling(store, target, clock) as webhooks, asyncio.TaskGroup() as group:
        (job,) = await ended_jobs(store, 1)
        webhooks.observe(job)
        await webhooks.forget(job)
        await store.delete("jobs", job.id)
        await webhooks.run(group)
        await settled()
        assert target.ids == []
        assert await store.list(module.BUCKET, limit=10) == []
        assert (webhooks.count_of(job.tenant), webhooks.is_open(job.id)) == (0, False)


async def test_a_delivery_whose_job_another_gateway_deleted_is_dropped() -> None:
    store, target, clock = MemoryStore(), SlowTarget(), FakeClock()
    async with telling(store, target, clock) as webhooks, asyncio.TaskGroup() as group:
        (job,) = await ended_jobs(store, 1)
        webhooks.observe(job)
        await store.delete("jobs", job.id)
        for tries in range(module.GONE_TRIES + 1):
            assert len(await store.list(module.BUCKET, limit=10)) == (tries > 0)
            await webhooks.run(group)
            await settled()
            clock.advance(2 * BACKOFF_S[-1])
        assert target.ids == []
        assert await store.list(module.BUCKET, limit=10) == []
        assert webhooks.count_of(job.tenant) == 0
