"""A job that its caller waits for is written once, with its end; what was told of it before is durable all the same."""

import asyncio

import pytest

from fanlight.errors import LeaseLost, Unavailable
from services.gateway.app.job_store import JOBS, JOBS_BUCKET
from services.gateway.app.tenants import Caller
from services.gateway.domain.job import PREPROCESS, Job, JobState
from tests.fakes.fleet import Fleet, annotation
from tests.fakes.memory_store import MemoryStore


class MoodyStore(MemoryStore):
    """Counts the writes of jobs, and refuses as many as the test says."""

    refusals = 0
    # Writes of which the caller learns nothing, and how many turns of the loop later they end.
    silences = turns = 0

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    async def create(self, bucket, key, value, *, after=None):
        self._count(bucket, "create")
        record = await super().create(bucket, key, value, after=after)
        if bucket == JOBS_BUCKET and self.silences:
            # As where the caller's call is cancelled while a thread writes.
            self.silences -= 1
            for _ in range(self.turns):
                await asyncio.sleep(0)
            raise asyncio.CancelledError
        return record

    async def put(self, bucket, key, value, *, revision, after=None):
        self._count(bucket, "put")
        return await super().put(bucket, key, value, revision=revision, after=after)

    def _count(self, bucket: str, what: str) -> None:
        if bucket != JOBS_BUCKET:
            return
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("the disk is full")
        self.writes.append(what)

    async def job(self, job: Job) -> Job | None:
        record = await self.get(JOBS_BUCKET, job.id)
        return JOBS.decode(record.value) if record else None


@pytest.fixture
async def store() -> MoodyStore:
    return MoodyStore()


@pytest.fixture
async def fleet(store: MoodyStore):
    async with Fleet(store=store).running() as running:
        await running.worker(PREPROCESS).come()
        yield running


async def begun(fleet: Fleet) -> Job:
    return await fleet.gateway.jobs.create(annotation(), is_waited_for=True)


async def test_its_one_write_is_its_end(fleet: Fleet, store: MoodyStore) -> None:
    job = await begun(fleet)
    assert await store.job(job) is None
    assert await fleet.worker(PREPROCESS).work() == 1
    assert store.writes == ["create"]
    written = await store.job(job)
    assert written is not None
    assert written.state is JobState.SUCCEEDED
    assert written == await fleet.get(job)


async def test_its_end_is_told_only_once_it_is_durable(fleet: Fleet, store: MoodyStore) -> None:
    job = await begun(fleet)
    worker = fleet.worker(PREPROCESS)
    (task,) = await worker.lease()
    store.refusals = 1
    with pytest.raises(Unavailable):
        await worker.complete(task)
    assert (await fleet.get(job)).state is JobState.RUNNING
    # The worker tries again.
    await worker.complete(task)
    assert (await store.job(job)).state is JobState.SUCCEEDED


async def test_before_it_is_told_of_it_is_written_as_it_is(fleet: Fleet, store: MoodyStore) -> None:
    job = await begun(fleet)
    waited = await fleet.gateway.jobs.wait(job.name, wait_s=0.0)
    await fleet.gateway.jobs.keep(waited)
    assert (await store.job(job)).state is JobState.QUEUED
    await fleet.gateway.jobs.keep(waited)
    assert await fleet.worker(PREPROCESS).work() == 1
    assert store.writes == ["create", "put", "put"]
    assert (await store.job(job)).state is JobState.SUCCEEDED


async def test_a_late_worker_does_not_end_it(fleet: Fleet, store: MoodyStore) -> None:
    """A token that is not the task's makes the gateway look at the store, which has no such job."""
    job = await begun(fleet)
    worker = fleet.worker(PREPROCESS)
    (task,) = await worker.lease()
    await fleet.gateway.queue.give_back(task.token)
    with pytest.raises(LeaseLost):
        await worker.complete(task)
    assert (await fleet.get(job)).state is JobState.QUEUED


async def test_a_cancelled_one_is_written_as_cancelled(fleet: Fleet, store: MoodyStore) -> None:
    job = await begun(fleet)
    await fleet.gateway.jobs.cancel(job.name)
    assert (await store.job(job)).state is JobState.CANCELLED


async def test_one_of_a_deleted_tenant_ends_and_is_never_written(fleet: Fleet, store: MoodyStore) -> None:
    caller = Caller(tenant="acme")
    job = await fleet.gateway.jobs.create(annotation(), caller, is_waited_for=True)
    worker = fleet.worker(PREPROCESS)
    (task,) = await worker.lease()
    await fleet.gateway.tenant_deletions.delete("acme")
    with pytest.raises(LeaseLost):
        await worker.complete(task)
    await fleet.gateway.jobs.keep(job)
    assert store.writes == []


async def test_others_jobs_are_written_at_once(fleet: Fleet, store: MoodyStore) -> None:
    job = await fleet.gateway.jobs.create(annotation())
    assert (await store.job(job)).state is JobState.QUEUED


@pytest.mark.parametrize("turns", [0, 10])
async def test_an_end_that_was_written_for_a_call_that_was_cancelled_holds(
    fleet: Fleet, store: MoodyStore, turns: int
) -> None:
    """Whether the gateway learns of the record from the store first, or from its next try."""
    job = await begun(fleet)
    worker = fleet.worker(PREPROCESS)
    (task,) = await worker.lease()
    store.silences, store.turns = 1, turns
    with pytest.raises(asyncio.CancelledError):
        await worker.complete(task)
    await worker.complete(task)
    assert (await fleet.gateway.jobs.cancel(job.name)).state is JobState.SUCCEEDED
    assert (await fleet.gateway.jobs.wait(job.name, wait_s=5.0)).state is JobState.SUCCEEDED
    await fleet.gateway.jobs.keep(job)


@pytest.mark.parametrize("turns", [0, 10])
async def test_one_that_was_written_for_a_caller_who_left_goes_on(fleet: Fleet, store: MoodyStore, turns: int) -> None:
    job = await begun(fleet)
    store.silences, store.turns = 1, turns
    with pytest.raises(asyncio.CancelledError):
        await fleet.gateway.jobs.keep(job)
    await fleet.gateway.jobs.keep(job)
    assert await fleet.worker(PREPROCESS).work() == 1
    assert (await store.job(job)).state is JobState.SUCCEEDED
