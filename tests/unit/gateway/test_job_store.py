"""A store may notify late, out of order, or from a server that lags; the known state never becomes older."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fanlight.errors import Unavailable
from services.gateway.app import job_store as ledgers
from services.gateway.app.job_store import JOBS, JOBS_BUCKET, LAGS_LIMIT, JobStore
from services.gateway.app.records import Records
from services.gateway.domain import machine
from services.gateway.domain.job import Job, JobState, Lease
from services.gateway.ports import NewRecord, Record
from tests.fakes.fleet import FakeClock, Fleet, generation
from tests.fakes.memory_store import MemoryStore


class LateStore(MemoryStore):
    """Its watchers hear what the test says, and its next reads come from a server that has fallen behind."""

    def __init__(self) -> None:
        super().__init__()
        # What the next reads give, one each; then they give what is there.
        self.old: list[Record] = []

    async def get(self, bucket: str, key: str) -> Record | None:
        return self.old.pop(0) if self.old else await super().get(bucket, key)

    def tell_again(self, record: Record) -> None:
        """A change that comes to the watchers late."""
        self._watchers.notify(JOBS_BUCKET, record)


class HastyStore(LateStore):
    """Before a write returns, another gateway has written too, and the watch of this one has delivered the change."""

    next_job: Job | None = None

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        record = await super().put(bucket, key, value, revision=revision, after=after)
        if self.next_job is not None:
            job, self.next_job = self.next_job, None
            await super().put(bucket, key, JOBS.encode(job), revision=record.revision)
            await heard()
        return record


async def heard() -> None:
    """Let the ledger take in what its watch has."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def job() -> Job:
    async with Fleet().running() as fleet:
        await fleet.worker("diffusion").come()
        return await fleet.gateway.jobs.create(generation())


@pytest.fixture
def store() -> LateStore:
    return LateStore()


@asynccontextmanager
async def following(store: LateStore) -> AsyncIterator[JobStore]:
    ledger = JobStore(Records(store, FakeClock()))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(ledger.follow())
        await ledger.caught_up.wait()
        yield ledger
        store.close()


def cancelled(job: Job) -> Job:
    return machine.cancel(job, now_s=job.create_time_s + 1.0)


def leased(job: Job) -> Job:
    return machine.lease(job, 1, Lease(token="t", worker="w", node="n", time_s=1.0), now_s=1.0)


async def test_a_late_notification_replaces_no_newer_state(store: LateStore, job: Job) -> None:
    async with following(store) as ledger:
        seen: list[JobState] = []
        await ledger.create(job)
        first = await store.get(JOBS_BUCKET, job.id)
        await ledger.change(job.id, cancelled)
        ledger.observe(lambda job: seen.append(job.state))
        store.tell_again(first)
        await heard()
        assert (await ledger.get(job.id)).state is JobState.CANCELLED
        assert (list(ledger.open_jobs), [each.id for each in ledger.ended], seen) == ([], [job.id], [])


async def test_a_late_notification_replaces_no_newer_state_of_an_open_job(store: LateStore, job: Job) -> None:
    async with following(store) as ledger:
        await ledger.create(job)
        first = await store.get(JOBS_BUCKET, job.id)
        changed = await ledger.change(job.id, leased)
        store.tell_again(first)
        await heard()
        assert await ledger.get(job.id) == changed
        assert list(ledger.open_jobs) == [changed]


async def test_an_own_write_replaces_no_newer_state_that_arrived_before_the_write_returned(job: Job) -> None:
    store = HastyStore()
    async with following(store) as ledger:
        await ledger.create(job)
        store.next_job = cancelled(job)
        await ledger.change(job.id, leased)
        assert (await ledger.get(job.id)).state is JobState.CANCELLED
        assert list(ledger.open_jobs) == []


async def test_a_record_that_is_older_than_what_is_known_is_read_again(
    store: LateStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "LAG_PAUSE_S", 0.0)
    async with following(store) as ledger:
        await ledger.create(job)
        first = await store.get(JOBS_BUCKET, job.id)
        await ledger.change(job.id, cancelled)
        store.old = [first] * 3
        assert (await ledger.fresh(job.id)).state is JobState.CANCELLED
        assert store.old == []


async def test_a_store_that_lags_behind_is_unavailable_and_returns_nothing_old(
    store: LateStore, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "LAG_PAUSE_S", 0.0)
    async with following(store) as ledger:
        await ledger.create(job)
        first = await store.get(JOBS_BUCKET, job.id)
        await ledger.change(job.id, cancelled)
        store.old = [first] * LAGS_LIMIT
        with pytest.raises(Unavailable, match="lags behind"):
            await ledger.fresh(job.id)
        assert (await ledger.get(job.id)).state is JobState.CANCELLED


async def test_a_page_shows_an_open_job_as_it_is_known_and_not_as_an_older_record_says(
    store: LateStore, job: Job
) -> None:
    async with following(store) as ledger:
        await ledger.create(job)
        first = await store.get(JOBS_BUCKET, job.id)
        changed = await ledger.change(job.id, leased)
        store._buckets[JOBS_BUCKET][job.id] = first
        assert list(await ledger.page(before="", limit=5)) == [(changed.id, changed)]


async def test_a_page_shows_a_record_that_is_newer_than_what_is_known(store: LateStore, job: Job) -> None:
    async with following(store) as ledger:
        await ledger.create(job)
        # Not heard of yet: nothing has run since.
        store._set(JOBS_BUCKET, job.id, JOBS.encode(cancelled(job)))
        ((_, shown),) = await ledger.page(before="", limit=5)
        assert shown is not None
        assert shown.state is JobState.CANCELLED
