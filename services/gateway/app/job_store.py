"""The jobs of the store, and which request ids were used. The only module that writes jobs.

A change is a compare-and-set on the job's whole record, retried on what another gateway made of it meanwhile. Which
change is allowed is for `domain.machine` to say.
"""

import asyncio
import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fanlight.errors import AlreadyExists, Conflict, LeaseLost, NotFound, Unavailable
from services.gateway.app.records import Codec, Records, UnreadableRecord
from services.gateway.domain import machine
from services.gateway.domain.integrity import fault_of
from services.gateway.domain.job import DEFAULT_TENANT, Job
from services.gateway.domain.workers import WorkerRecord
from services.gateway.ports import CaughtUp, Clock, Deleted, NewRecord, Record, WriteProbe, store_fault
from services.kernel.blobs import BlobStore
from services.kernel.logs import get_logger

log = get_logger()

JOBS_BUCKET = "jobs"
REQUESTS_BUCKET = "requests"
PROBE_BUCKET, PROBE_KEY = "probes", "0"
PROBE_INTERVAL_S = 5.0
# No bytes have it.
ABSENT_DIGEST = "sha256:" + "0" * 64
# In each round another gateway's change was first, so that so many mean that something is wrong.
ROUNDS_LIMIT = 100
LAGS_LIMIT, LAG_PAUSE_S = 10, 0.2

Event = Callable[[Job], Job]
Observer = Callable[[Job], None]


JOBS: Codec[Job] = Codec(Job, fault_of=fault_of, key_of=lambda job: job.id)
WORKERS: Codec[WorkerRecord] = Codec(WorkerRecord)


@dataclass(frozen=True, slots=True)
class _StoredJob:
    job: Job
    # The record's, for compare-and-set.
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedJob:
    """What is remembered of a job that has ended, for its retention."""

    id: str
    tenant: str
    end_s: float
    # The record's.
    revision: int


class JobStore:
    """Open jobs are cached in memory; ended ones are read from the store when asked for."""

    def __init__(self, store: Records) -> None:
        self._store = store
        self._open: dict[str, _StoredJob] = {}
        # The open jobs that are in memory alone, each with the lock of its changes.
        self._unwritten: dict[str, asyncio.Lock] = {}
        self._observers: list[Observer] = []
        self._gone: list[Callable[[str], None]] = []
        # By id, in the order in which this process learned of the end.
        self._ended: dict[str, EndedJob] = {}
        self.caught_up = asyncio.Event()

    def observe(self, observer: Observer) -> None:
        """Call it with every new state of every job; also with the states found when the gateway starts."""
        self._observers.append(observer)

    def on_gone(self, gone: Callable[[str], None]) -> None:
        """Call it with the id of every job that is deleted."""
        self._gone.append(gone)

    @property
    def open_jobs(self) -> Iterable[Job]:
        return (stored.job for stored in self._open.values())

    def open_job(self, job_id: str) -> Job | None:
        """As cached; None where it has ended, or is not known here."""
        stored = self._open.get(job_id)
        return stored.job if stored else None

    @property
    def ended(self) -> Sequence[EndedJob]:
        """The ended jobs, the earliest end first."""
        return sorted(self._ended.values(), key=lambda each: each.end_s)

    async def create(self, job: Job, *, after: NewRecord | None = None) -> Job:
        """Durable on return. AlreadyExists, also where the record `after`, which must come first, exists already."""
        record = await self._store.create(JOBS_BUCKET, job.id, JOBS.encode(job), after=after)
        self._apply(job, record.revision)
        return job

    def begin(self, job: Job) -> Job:
        """Take in a job that nobody is told of before it ended, or before `write`: until then it is in memory alone.

        For a store without other gateways, which would not see it.
        """
        self._unwritten[job.id] = asyncio.Lock()
        self._open[job.id] = _StoredJob(job, 0)
        self._publish(job)
        return job

    async def write(self, job_id: str) -> None:
        """Durable on return; nothing to do where it is already."""
        async with self._unwritten.get(job_id) or asyncio.Lock():
            if job_id in self._unwritten:
                with contextlib.suppress(AlreadyExists):
                    await self._write_first(self._open[job_id].job)
                    return
                await self._take_written(job_id)

    def drop_unwritten(self, tenant: str) -> None:
        """End the tenant's jobs that are in memory alone: none is written after the tenant was deleted."""
        for job_id in list(self._unwritten):
            if (stored := self._open.get(job_id)) is not None and stored.job.tenant == tenant:
                self._drop(job_id)

    async def _write_first(self, job: Job) -> None:
        record = await self._store.create(JOBS_BUCKET, job.id, JOBS.encode(job))
        self._unwritten.pop(job.id, None)
        self._apply(job, record.revision)

    async def _take_written(self, job_id: str) -> None:
        """The store has it: the call that wrote it was cancelled, or failed, before it learned of that."""
        self._unwritten.pop(job_id, None)
        await self._read(job_id)

    async def get(self, job_id: str) -> Job:
        """NotFound."""
        return (await self._find(job_id)).job

    async def fresh(self, job_id: str) -> Job:
        """As the store has it now, not as it is cached; for callers that would otherwise refuse. NotFound."""
        return (await self._read(job_id)).job

    async def page(self, *, before: str, limit: int) -> Sequence[tuple[str, Job | None]]:
        """By id, newest first, ids less than `before`; None where the record cannot be read."""
        records = await self._store.list(JOBS_BUCKET, before=before, limit=limit)
        return [(record.key, self._decoded(record)) for record in records]

    async def change(self, job_id: str, event: Event) -> Job:
        """The job after the event, which is retried on what another gateway made of the job meanwhile."""
        async with self._unwritten.get(job_id) or asyncio.Lock():
            if job_id in self._unwritten:
                with contextlib.suppress(AlreadyExists):
                    return await self._change_unwritten(job_id, event)
                await self._take_written(job_id)
        stored = await self._find(job_id)
        for _ in range(ROUNDS_LIMIT):
            try:
                job = event(stored.job)
            except (Conflict, LeaseLost):
                # Perhaps only because another gateway's change has not arrived here yet.
                fresh = await self._read(job_id)
                if fresh.revision == stored.revision:
                    raise
                stored = fresh
                continue
            if job is stored.job:
                return job
            try:
                record = await self._store.put(JOBS_BUCKET, job_id, JOBS.encode(job), revision=stored.revision)
            except Conflict:
                stored = await self._read(job_id)
            else:
                self._apply(job, record.revision)
                return job
        raise Conflict(f"jobs/{job_id} changes too often")

    async def _change_unwritten(self, job_id: str, event: Event) -> Job:
        """In memory, unless the job ends by it: then it is written as it ended, before anybody is told."""
        before = self._open[job_id].job
        job = event(before)
        if job is before:
            return job
        if job.state.ended:
            await self._write_first(job)
        else:
            self._open[job_id] = _StoredJob(job, 0)
            self._publish(job)
        return job

    async def forget(self, job_id: str) -> None:
        """Delete it. Whoever works on it loses the lease."""
        await self._store.delete(JOBS_BUCKET, job_id)
        self._drop(job_id)

    async def follow(self) -> None:
        """Take in what is in the store, then what others write to it; ends when the store is closed."""
        async for change in self._store.watch(JOBS_BUCKET):
            if isinstance(change, CaughtUp):
                self.caught_up.set()
            elif isinstance(change, Deleted):
                self._drop(change.key)
            elif change.revision > self._known_revision(change.key) and (
                job := self._store.read(JOBS, JOBS_BUCKET, change)
            ):
                self._apply(job, change.revision)

    async def _find(self, job_id: str) -> _StoredJob:
        return self._open.get(job_id) or await self._read(job_id)

    async def _record(self, job_id: str) -> Record | None:
        """Never older than what is known here: a server that has just become the store's leader may lag behind.

        A record that cannot be read is damaged, however old it seems: UnreadableRecord.
        """
        for _ in range(LAGS_LIMIT):
            record = await self._store.get(JOBS_BUCKET, job_id)
            if record is None or record.revision >= self._known_revision(job_id):
                return record
            self._store.decode(JOBS, JOBS_BUCKET, record)
            await asyncio.sleep(LAG_PAUSE_S)
        raise Unavailable("the store lags behind", retry_after_s=1.0)

    async def _read(self, job_id: str) -> _StoredJob:
        """NotFound; UnreadableRecord for a damaged record: no gateway can continue that job."""
        if job_id in self._unwritten and (unwritten := self._open.get(job_id)):
            return unwritten
        try:
            record = await self._record(job_id)
            job = self._store.decode(JOBS, JOBS_BUCKET, record) if record else None
        except UnreadableRecord:
            self._drop(job_id)
            raise
        if record is None or job is None:
            self._drop(job_id)
            raise NotFound("there is no such job", field="name")
        stored = _StoredJob(job, record.revision)
        if stored.revision > self._known_revision(job_id):
            self._apply(stored.job, stored.revision)
        return stored

    def _drop(self, job_id: str) -> None:
        """It is gone from the store, or damaged. Observers that still count on it see it cancelled."""
        self._ended.pop(job_id, None)
        self._unwritten.pop(job_id, None)
        stored = self._open.pop(job_id, None)
        if stored is not None:
            self._publish(machine.cancel(stored.job, now_s=stored.job.create_time_s))
        for gone in self._gone:
            gone(job_id)

    def _decoded(self, record: Record) -> Job | None:
        stored = self._open.get(record.key)
        return (
            stored.job if stored and stored.revision >= record.revision else self._store.read(JOBS, JOBS_BUCKET, record)
        )

    def _known_revision(self, job_id: str) -> int:
        if stored := self._open.get(job_id):
            return stored.revision
        ended = self._ended.get(job_id)
        return ended.revision if ended else 0

    def _apply(self, job: Job, revision: int) -> None:
        if revision <= self._known_revision(job.id):
            return
        self._unwritten.pop(job.id, None)
        if job.state.ended:
            self._open.pop(job.id, None)
            self._ended[job.id] = EndedJob(
                id=job.id, tenant=sys.intern(job.tenant), end_s=job.end_time_s, revision=revision
            )
        else:
            self._ended.pop(job.id, None)
            self._open[job.id] = _StoredJob(job, revision)
        self._publish(job)

    def _publish(self, job: Job) -> None:
        for observer in self._observers:
            observer(job)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyRecord:
    job_id: str
    content_digest: str


REQUESTS: Codec[IdempotencyRecord] = Codec(IdempotencyRecord)


class IdempotencyKeys:
    """Which job a client's request id belongs to. The gateway that creates the record first has decided it."""

    def __init__(self, store: Records) -> None:
        self._store = store

    async def job_of(self, request_id: str, content_digest: str, tenant: str) -> str | None:
        """The id of its job, which may not exist yet. AlreadyExists for other content."""
        record = await self._store.get(REQUESTS_BUCKET, _request_key(request_id, tenant)) if request_id else None
        if record is None:
            return None
        request = self._store.decode(REQUESTS, REQUESTS_BUCKET, record)
        if request.content_digest != content_digest:
            raise AlreadyExists("was used with other content before", field="request_id")
        return request.job_id

    def claim(self, request_id: str, content_digest: str, tenant: str, job_id: str) -> NewRecord | None:
        """The record that binds the request id to this job, to be created before the job; None without a request id."""
        if not request_id:
            return None
        value = REQUESTS.encode(IdempotencyRecord(job_id=job_id, content_digest=content_digest))
        return NewRecord(bucket=REQUESTS_BUCKET, key=_request_key(request_id, tenant), value=value)

    async def forget(self, request_id: str, tenant: str) -> None:
        if request_id:
            await self._store.delete(REQUESTS_BUCKET, _request_key(request_id, tenant))


def _request_key(request_id: str, tenant: str) -> str:
    """Each tenant has request ids of its own, whatever is in them: no tenant's name is empty."""
    is_plain = tenant == DEFAULT_TENANT and "/" not in request_id
    whole = request_id if is_plain else f"{'' if tenant == DEFAULT_TENANT else tenant}/{request_id}"
    return hashlib.sha256(whole.encode()).hexdigest()


class StoreProbe:
    """Whether the stores work: rewrites a small record when asked, at most every `PROBE_INTERVAL_S`."""

    def __init__(self, store: Records, clock: Clock, blobs: BlobStore) -> None:
        self._store = store
        self._clock = clock
        self._blobs = blobs
        self._good_until_s = 0.0

    async def write(self) -> None:
        """Unavailable where a store accepts no writes, or what is stored is gone."""
        if fault := self._store.fault:
            raise Unavailable(fault, retry_after_s=PROBE_INTERVAL_S)
        now_s = self._clock.monotonic_s()
        # A fault of the blobs is looked at again: it may have gone.
        if now_s < self._good_until_s and not store_fault(self._blobs):
            return
        value = str(self._clock.now_s()).encode()
        record = await self._store.get(PROBE_BUCKET, PROBE_KEY)
        try:
            if record is None:
                await self._store.create(PROBE_BUCKET, PROBE_KEY, value)
            else:
                await self._store.put(PROBE_BUCKET, PROBE_KEY, value, revision=record.revision)
        except (AlreadyExists, Conflict):
            # Another gateway's write has just succeeded, so the store accepts writes.
            pass
        if isinstance(self._blobs, WriteProbe):
            await self._blobs.probe()
        await self._look_at_blobs()
        self._good_until_s = now_s + PROBE_INTERVAL_S

    async def read(self) -> None:
        """Look at both stores without writing, so that one that is gone is noticed also while nobody asks."""
        await self._store.get(PROBE_BUCKET, PROBE_KEY)
        await self._look_at_blobs()

    async def _look_at_blobs(self) -> None:
        await self._blobs.stat(DEFAULT_TENANT, ABSENT_DIGEST)
        self._refuse_fault()

    def _refuse_fault(self) -> None:
        if fault := self._store.fault or store_fault(self._blobs):
            raise Unavailable(fault, retry_after_s=PROBE_INTERVAL_S)
