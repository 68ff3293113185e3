"""Tells webhooks that jobs have ended: at least once, tried again for days, with a log of every try.

The records are shared: whichever gateway claims a try makes it, and another goes on where one has died.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fanlight.errors import AlreadyExists, Conflict, FailedPrecondition, FanlightError, NotFound
from services.gateway.app.ledger import BUCKET as JOBS_BUCKET
from services.gateway.app.records import JOBS, Codec
from services.gateway.app.signing import signed
from services.gateway.app.targets import Network, refuse_inward
from services.gateway.jobs.deliveries import PAUSES_S, Delivery, DeliveryState, Try, claimed, tried
from services.gateway.jobs.model import Job
from services.gateway.ports import CaughtUp, Clock, Deleted, JobStore, WebhookSender
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "deliveries"
SENDING_LIMIT = 16
# Jobs whose delivery is still to be written down.
NOTED_LIMIT = 100_000

DELIVERIES: Codec[Delivery] = Codec(Delivery)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookOptions:
    sender: WebhookSender
    # The body that tells of a job's end.
    payload: Callable[[Job], bytes]
    # By tenant; what a tenant's webhooks are signed with where it has none of its own.
    keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    default_key: bytes = field(default=b"", repr=False)
    allowed: tuple[Network, ...] = ()

    def key_of(self, tenant: str) -> bytes:
        return self.keys.get(tenant, self.default_key)


@dataclass(slots=True)
class _Known:
    delivery: Delivery
    revision: int
    # On the monotonic clock.
    due_s: float


class Webhooks:
    def __init__(self, store: JobStore, clock: Clock, random_bytes: Callable[[int], bytes]) -> None:
        self._store = store
        self._clock = clock
        self._random_bytes = random_bytes
        self._options: WebhookOptions | None = None
        self._noted: dict[str, Job] = {}
        self._known: dict[str, _Known] = {}
        self._caught_up = False
        self._sending: set[str] = set()

    def use(self, options: WebhookOptions) -> None:
        self._options = options

    def check(self, url: str, tenant: str) -> None:
        """InvalidField and FailedPrecondition for what will never be told."""
        if not url:
            return
        if self._options is None or not self._options.key_of(tenant):
            raise FailedPrecondition("this gateway has no secret to sign webhooks with", field="webhook_url")
        refuse_inward(url, self._options.allowed, field="webhook_url")

    def observe(self, job: Job) -> None:
        key = _key(job)
        if job.state.ended and job.webhook_url and key not in self._known and len(self._noted) < NOTED_LIMIT:
            self._noted[key] = job

    async def get(self, job: Job) -> Delivery:
        """NotFound where nobody is told, or the job has not ended."""
        record = await self._store.get(BUCKET, _key(job))
        if record is None:
            raise NotFound("nothing has been told of this job", field="name")
        return DELIVERIES.decode(record.value)

    async def forget(self, job: Job) -> None:
        if job.webhook_url:
            for times in range(job.redrives + 1):
                await self._store.delete(BUCKET, f"{job.id}.{times}")

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if isinstance(change, CaughtUp):
                self._caught_up = True
            elif isinstance(change, Deleted):
                self._known.pop(change.key, None)
            elif delivery := DELIVERIES.read(BUCKET, change):
                self._take(change.key, delivery, change.revision)

    def _take(self, key: str, delivery: Delivery, revision: int) -> None:
        known = self._known.get(key)
        if known is None or known.revision < revision:
            wait_s = min(max(0.0, delivery.next_s - self._clock.now_s()), 2 * PAUSES_S[-1])
            self._known[key] = _Known(delivery, revision, self._clock.monotonic_s() + wait_s)

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Write down what ended, and begin the tries that are due."""
        if self._options is None or not self._caught_up:
            return
        for key, job in list(self._noted.items()):
            await self._write_down(key, job)
            self._noted.pop(key, None)
        now_s = self._clock.monotonic_s()
        for key, known in list(self._known.items()):
            is_due = known.delivery.state is DeliveryState.PENDING and known.due_s <= now_s
            if is_due and key not in self._sending and len(self._sending) < SENDING_LIMIT:
                self._sending.add(key)
                group.create_task(self._deliver(key, known, self._options))

    async def _write_down(self, key: str, job: Job) -> None:
        delivery = Delivery(id=f"msg_{key.replace('.', '_')}", job_id=job.id, url=job.webhook_url, tenant=job.tenant)
        with contextlib.suppress(AlreadyExists):
            record = await self._store.create(BUCKET, key, DELIVERIES.encode(delivery))
            self._take(key, delivery, record.revision)

    async def _deliver(self, key: str, known: _Known, options: WebhookOptions) -> None:
        try:
            delivery = claimed(known.delivery, now_s=self._clock.now_s())
            record = await self._store.put(BUCKET, key, DELIVERIES.encode(delivery), revision=known.revision)
            self._take(key, delivery, record.revision)
            after = tried(delivery, await self._try(delivery, options), chance=self._random_bytes(1)[0] / 256)
            record = await self._store.put(BUCKET, key, DELIVERIES.encode(after), revision=record.revision)
            self._take(key, after, record.revision)
            log.info("webhook_tried", job=f"jobs/{after.job_id}", state=after.state.value, tries=len(after.tries))
        except Conflict:
            # Another gateway tries it.
            return
        except FanlightError as error:
            log.warning("webhook_not_written", reason=error.reason, message=error.message)
        finally:
            self._sending.discard(key)

    async def _try(self, delivery: Delivery, options: WebhookOptions) -> Try:
        begin_s, now_s = self._clock.monotonic_s(), self._clock.now_s()
        status, error, is_refused = 0, "", False
        try:
            body = options.payload(await self._job(delivery.job_id))
            key = options.key_of(delivery.tenant)
            headers = signed(key, message_id=delivery.id, now_s=int(now_s), body=body)
            status = await options.sender.post(delivery.url, headers, body)
        except FanlightError as trouble:
            error, is_refused = trouble.message, isinstance(trouble, FailedPrecondition)
        duration_s = self._clock.monotonic_s() - begin_s
        return Try(time_s=now_s, status=status, error=error, is_refused=is_refused, duration_s=duration_s)

    async def _job(self, job_id: str) -> Job:
        record = await self._store.get(JOBS_BUCKET, job_id)
        if record is None:
            raise NotFound("the job is forgotten", field="name")
        return JOBS.decode(record.value)


def _key(job: Job) -> str:
    return f"{job.id}.{job.redrives}"
