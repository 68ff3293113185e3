"""The jobs of the store, how values become records, and which request ids were used. The only module that writes jobs.

A change is a compare-and-set on the job's whole record, retried on what another gateway made of it meanwhile. Which
change is allowed is for `domain.machine` to say.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from fanlight.errors import AlreadyExists, Conflict, FailedPrecondition, LeaseLost, NotFound, Unavailable
from services.gateway.domain import machine
from services.gateway.domain.integrity import fault_of
from services.gateway.domain.job import DEFAULT_TENANT, Job
from services.gateway.domain.workers import WorkerRecord
from services.gateway.ports import CaughtUp, Clock, Deleted, NewRecord, Record, RecordStore
from services.kernel.logs import get_logger

log = get_logger()

# The version of the records' format. 2: a job keeps its stages' request messages.
FORMAT_VERSION = 2

JOBS_BUCKET = "jobs"
REQUESTS_BUCKET = "requests"
PROBE_BUCKET, PROBE_KEY = "probes", "0"
PROBE_INTERVAL_S = 5.0
# In each round another gateway's change was first, so that so many mean that something is wrong.
ROUNDS_LIMIT = 100
LAGS_LIMIT, LAG_PAUSE_S = 10, 0.2

T = TypeVar("T")
Event = Callable[[Job], Job]
Observer = Callable[[Job], None]


class UnreadableRecord(FailedPrecondition):
    """A record that this gateway cannot read: of another format version, or damaged. Other records are unaffected."""

    reason = "UNREADABLE_RECORD"


class OtherFormatVersion(UnreadableRecord):
    """Written by an older or a newer Fanlight."""


class Codec(Generic[T]):
    """Values of one type as the bytes of records, and back."""

    def __init__(
        self, kind: Any, *, fault_of: Callable[[T], str] | None = None, key_of: Callable[[T], str] | None = None
    ) -> None:
        """`fault_of`: why a value of the right types cannot be; empty where it can. `key_of`: its record's key."""
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)
        self._fault_of = fault_of
        self._key_of = key_of
        self._head = b'{"version":%d,"value":' % FORMAT_VERSION

    def encode(self, value: T) -> bytes:
        """Leaves defaults out, which therefore must never change within a format version."""
        return b"%b%b}" % (self._head, self._adapter.dump_json(value, exclude_defaults=True))

    def decode(self, data: bytes) -> T:
        """OtherFormatVersion, UnreadableRecord."""
        if not data.startswith(self._head):
            raise _not_ours(data)
        try:
            value = self._adapter.validate_json(data[len(self._head) : -1])
        except ValidationError as error:
            where = error.errors(include_url=False, include_input=False)[0]
            raise UnreadableRecord(f"{'.'.join(map(str, where['loc']))}: {where['msg']}") from error
        if self._fault_of is not None and (fault := self._fault_of(value)):
            raise UnreadableRecord(fault)
        return value

    def decode_record(self, record: Record) -> T:
        """OtherFormatVersion, UnreadableRecord; also for another key's value."""
        value = self.decode(record.value)
        if self._key_of is not None and (key := self._key_of(value)) != record.key:
            raise UnreadableRecord(f"id: is {key[:80]!r}, and the record's key is {record.key!r}")
        return value

    def read(self, bucket: str, record: Record) -> T | None:
        """None for a record that cannot be read: it is logged and skipped, and stops no gateway and no list."""
        try:
            return self.decode_record(record)
        except UnreadableRecord as error:
            log.error("unreadable_record_skipped", bucket=bucket, key=record.key, why=error.message)
            return None


async def refuse_other_format(store: RecordStore, buckets: Iterable[str]) -> None:
    """OtherFormatVersion where a record of the store has another format version than those of this gateway."""
    for bucket in buckets:
        for record in await store.list(bucket, limit=1):
            version = _version_of(record.value)
            if version is not None and version != FORMAT_VERSION:
                raise OtherFormatVersion(
                    f"{bucket} have format version {version}; this gateway reads and writes version {FORMAT_VERSION}"
                )


def _not_ours(data: bytes) -> UnreadableRecord:
    version = _version_of(data)
    if version is None or version == FORMAT_VERSION:
        return UnreadableRecord("it is not a record of Fanlight")
    return OtherFormatVersion(f"it has format version {version}; this gateway reads version {FORMAT_VERSION}")


def _version_of(data: bytes) -> object:
    """None where the record has no version."""
    try:
        return json.loads(data)["version"]
    except (ValueError, KeyError, TypeError):
        return None


JOBS: Codec[Job] = Codec(Job, fault_of=fault_of, key_of=lambda job: job.id)
WORKERS: Codec[WorkerRecord] = Codec(WorkerRecord)


@dataclass(frozen=True, slots=True)
class _StoredJob:
    job: Job
    # The record's, for compare-and-set.
    revision: int


class JobStore:
    """Open jobs are cached in memory; ended ones are read from the store when asked for."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._open: dict[str, _StoredJob] = {}
        self._observers: list[Observer] = []
        # Job id to (end time, record's revision), in the order in which this process learned of the end.
        self._ended: dict[str, tuple[float, int]] = {}
        self.caught_up = asyncio.Event()

    def observe(self, observer: Observer) -> None:
        """Call it with every new state of every job; also with the states found when the gateway starts."""
        self._observers.append(observer)

    @property
    def open_jobs(self) -> Iterable[Job]:
        return (stored.job for stored in self._open.values())

    def open_job(self, job_id: str) -> Job | None:
        """As cached; None where it has ended, or is not known here."""
        stored = self._open.get(job_id)
        return stored.job if stored else None

    @property
    def ended(self) -> Sequence[tuple[str, float]]:
        """Ids and end times of the ended jobs, the earliest end first."""
        return sorted(((job_id, end) for job_id, (end, _) in self._ended.items()), key=lambda each: each[1])

    async def create(self, job: Job, *, after: NewRecord | None = None) -> Job:
        """Durable on return. AlreadyExists, also where the record `after`, which must come first, exists already."""
        record = await self._store.create(JOBS_BUCKET, job.id, JOBS.encode(job), after=after)
        self._apply(job, record.revision)
        return job

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

    async def forget(self, job_id: str) -> None:
        await self._store.delete(JOBS_BUCKET, job_id)
        self._ended.pop(job_id, None)

    async def follow(self) -> None:
        """Take in what is in the store, then what others write to it; ends when the store is closed."""
        async for change in self._store.watch(JOBS_BUCKET):
            if isinstance(change, CaughtUp):
                self.caught_up.set()
            elif isinstance(change, Deleted):
                self._drop(change.key)
            elif change.revision > self._known_revision(change.key) and (job := JOBS.read(JOBS_BUCKET, change)):
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
            JOBS.decode_record(record)
            await asyncio.sleep(LAG_PAUSE_S)
        raise Unavailable("the store lags behind", retry_after_s=1.0)

    async def _read(self, job_id: str) -> _StoredJob:
        """NotFound; UnreadableRecord for a damaged record: no gateway can continue that job."""
        try:
            record = await self._record(job_id)
            job = JOBS.decode_record(record) if record else None
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
        stored = self._open.pop(job_id, None)
        if stored is not None:
            self._publish(machine.cancel(stored.job, now_s=stored.job.create_time_s))

    def _decoded(self, record: Record) -> Job | None:
        stored = self._open.get(record.key)
        return stored.job if stored and stored.revision >= record.revision else JOBS.read(JOBS_BUCKET, record)

    def _known_revision(self, job_id: str) -> int:
        if stored := self._open.get(job_id):
            return stored.revision
        return self._ended.get(job_id, (0.0, 0))[1]

    def _apply(self, job: Job, revision: int) -> None:
        if revision <= self._known_revision(job.id):
            return
        if job.state.ended:
            self._open.pop(job.id, None)
            self._ended[job.id] = (job.end_time_s, revision)
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

    def __init__(self, store: RecordStore) -> None:
        self._store = store

    async def job_of(self, request_id: str, content_digest: str, tenant: str) -> str | None:
        """The id of its job, which may not exist yet. AlreadyExists for other content."""
        record = await self._store.get(REQUESTS_BUCKET, _request_key(request_id, tenant)) if request_id else None
        if record is None:
            return None
        request = REQUESTS.decode(record.value)
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
    """Each tenant has request ids of its own."""
    whole = request_id if tenant == DEFAULT_TENANT else f"{tenant}/{request_id}"
    return hashlib.sha256(whole.encode()).hexdigest()


class StoreProbe:
    """Whether the store accepts writes: rewrites a small record when asked, at most every `PROBE_INTERVAL_S`."""

    def __init__(self, store: RecordStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._good_until_s = 0.0

    async def write(self) -> None:
        """Unavailable where the store accepts no writes."""
        now_s = self._clock.monotonic_s()
        if now_s < self._good_until_s:
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
        self._good_until_s = now_s + PROBE_INTERVAL_S
