"""The jobs of the store; those that have not ended are kept in memory too. The only one that writes jobs."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fanlight.errors import Conflict, LeaseLost, NotFound, Unavailable
from services.gateway.app.records import JOBS
from services.gateway.jobs import machine
from services.gateway.jobs.model import Job
from services.gateway.ports import CaughtUp, Deleted, JobStore, New, Record
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "jobs"
# Each round somebody else's change wins, so this many mean that something is wrong.
ROUNDS_LIMIT = 100
LAGS_LIMIT, LAG_PAUSE_S = 10, 0.2

Event = Callable[[Job], Job]
Observer = Callable[[Job], None]


@dataclass(frozen=True, slots=True)
class _Held:
    job: Job
    # The record's, for compare-and-set.
    revision: int


class Ledger:
    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._held: dict[str, _Held] = {}
        self._observers: list[Observer] = []
        # Job id to (end time, record's revision), in the order in which this process learned of the end.
        self._ended: dict[str, tuple[float, int]] = {}
        self.caught_up = asyncio.Event()

    def observe(self, observer: Observer) -> None:
        """Call it with every new state of every job; also with the states found when the gateway starts."""
        self._observers.append(observer)

    @property
    def open_jobs(self) -> Iterable[Job]:
        return (held.job for held in self._held.values())

    @property
    def ended(self) -> Sequence[tuple[str, float]]:
        """Ids and end times of the ended jobs, those that ended first in front."""
        return sorted(((job_id, end) for job_id, (end, _) in self._ended.items()), key=lambda each: each[1])

    async def create(self, job: Job, *, after: New | None = None) -> Job:
        """Durable on return. AlreadyExists, also where the record is there that must come first."""
        record = await self._store.create(BUCKET, job.id, JOBS.encode(job), after=after)
        self._apply(job, record.revision)
        return job

    async def get(self, job_id: str) -> Job:
        """NotFound."""
        return (await self._find(job_id)).job

    async def fresh(self, job_id: str) -> Job:
        """As the store has it this moment; for those who would otherwise say no. NotFound."""
        return (await self._read(job_id)).job

    async def page(self, *, before: str, limit: int) -> Sequence[tuple[str, Job | None]]:
        """By id, newest first, ids less than `before`; None where the record cannot be read."""
        records = await self._store.list(BUCKET, before=before, limit=limit)
        return [(record.key, self._decoded(record)) for record in records]

    async def change(self, job_id: str, event: Event) -> Job:
        """The job after the event, which is tried again on what somebody else made of the job meanwhile."""
        held = await self._find(job_id)
        for _ in range(ROUNDS_LIMIT):
            try:
                job = event(held.job)
            except (Conflict, LeaseLost):
                # Perhaps only because another gateway's change has not been told yet.
                fresh = await self._read(job_id)
                if fresh.revision == held.revision:
                    raise
                held = fresh
                continue
            if job is held.job:
                return job
            try:
                record = await self._store.put(BUCKET, job_id, JOBS.encode(job), revision=held.revision)
            except Conflict:
                held = await self._read(job_id)
            else:
                self._apply(job, record.revision)
                return job
        raise Conflict(f"jobs/{job_id} changes too often")

    async def forget(self, job_id: str) -> None:
        await self._store.delete(BUCKET, job_id)
        self._ended.pop(job_id, None)

    async def follow(self) -> None:
        """Take in what is in the store, then what others write to it; ends when the store is closed."""
        async for change in self._store.watch(BUCKET):
            if isinstance(change, CaughtUp):
                self.caught_up.set()
            elif isinstance(change, Deleted):
                self._drop(change.key)
            elif change.revision > self._known_revision(change.key) and (job := JOBS.read(BUCKET, change)):
                self._apply(job, change.revision)

    async def _find(self, job_id: str) -> _Held:
        return self._held.get(job_id) or await self._read(job_id)

    async def _record(self, job_id: str) -> Record | None:
        """No older one than was heard of: a server that has just become the store's leader may not know the newest."""
        for _ in range(LAGS_LIMIT):
            record = await self._store.get(BUCKET, job_id)
            if record is None or record.revision >= self._known_revision(job_id):
                return record
            await asyncio.sleep(LAG_PAUSE_S)
        raise Unavailable("the store lags behind", retry_after_s=1.0)

    async def _read(self, job_id: str) -> _Held:
        record = await self._record(job_id)
        if record is None:
            self._drop(job_id)
            raise NotFound("there is no such job", field="name")
        held = _Held(JOBS.decode(record.value), record.revision)
        if held.revision > self._known_revision(job_id):
            self._apply(held.job, held.revision)
        return held

    def _drop(self, job_id: str) -> None:
        """It is gone from the store. Whoever still counts on it is told that it was cancelled."""
        self._ended.pop(job_id, None)
        held = self._held.pop(job_id, None)
        if held is not None:
            self._tell(machine.cancel(held.job, now_s=held.job.create_time_s))

    def _decoded(self, record: Record) -> Job | None:
        held = self._held.get(record.key)
        return held.job if held and held.revision >= record.revision else JOBS.read(BUCKET, record)

    def _known_revision(self, job_id: str) -> int:
        if held := self._held.get(job_id):
            return held.revision
        return self._ended.get(job_id, (0.0, 0))[1]

    def _apply(self, job: Job, revision: int) -> None:
        if revision <= self._known_revision(job.id):
            return
        if job.state.ended:
            self._held.pop(job.id, None)
            self._ended[job.id] = (job.end_time_s, revision)
        else:
            self._ended.pop(job.id, None)
            self._held[job.id] = _Held(job, revision)
        self._tell(job)

    def _tell(self, job: Job) -> None:
        for observer in self._observers:
            observer(job)
