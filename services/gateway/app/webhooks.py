"""Webhooks: one POST when a job ends, delivered at least once, retried with back-off for days, every attempt recorded.

Delivery records are shared: any gateway may claim the next attempt, and another goes on where one has died. Where a
webhook may lead and how it is signed (Standard Webhooks 1.0) is here too; sending is an adapter's work.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from urllib.parse import urlsplit

from fanlight.errors import AlreadyExists, Conflict, FailedPrecondition, FanlightError, InvalidField, NotFound
from services.gateway.app.job_store import JOBS, JOBS_BUCKET
from services.gateway.app.records import Codec, Records
from services.gateway.domain.delivery import BACKOFF_S, Delivery, DeliveryAttempt, DeliveryState, attempted, claimed
from services.gateway.domain.job import Job
from services.gateway.ports import CaughtUp, Clock, Deleted, WebhookSender
from services.kernel.logs import get_logger

log = get_logger()

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Well-known prefixes of IPv6 addresses whose last 32 bits are an IPv4 address.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
# One to four numbers, each decimal, octal or hexadecimal.
_NUMBERS = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+)){0,3}", re.IGNORECASE)
SECRET_PREFIX = "whsec_"
KEY_MIN_BYTES, KEY_MAX_BYTES = 24, 64
BUCKET = "deliveries"
SENDING_LIMIT = 64
# Of one tenant, so that targets that do not answer hold up no other tenant's.
SENDING_LIMIT_EACH = 16
# After so many tries a job that is not in the store is gone; before, the store may only lag behind.
GONE_TRIES = 3
# Ended jobs whose delivery record is still to be created.
PENDING_LIMIT = 100_000


def is_allowed(address: Address, allowed: Sequence[Network]) -> bool:
    """Internal addresses (private, loopback, link-local) only within an allowed network. Guards against SSRF."""
    meant = _embedded_ipv4(address)
    if any(each.version == network.version and each in network for network in allowed for each in (address, meant)):
        return True
    return meant.is_global and not meant.is_multicast and not meant.is_reserved


def _embedded_ipv4(address: Address) -> Address:
    """The IPv4 address that an IPv6 one embeds, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    embedded = address.ipv4_mapped or address.sixtofour
    if embedded is None and (address in _NAT64 or address in _COMPATIBLE):
        embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return embedded or address


def refuse_internal(url: str, allowed: Sequence[Network], *, field: str) -> None:
    """InvalidField for an internal address that is recognized without resolving names."""
    address = _address_of((urlsplit(url).hostname or "").rstrip("."))
    if address is not None and not is_allowed(address, allowed):
        raise InvalidField("points to an internal address, which this gateway does not allow", field=field)


def _address_of(host: str) -> Address | None:
    """None for a name. Numbers such as `2130706433` and `0x7f.1` are addresses wherever names are resolved."""
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.ip_address("127.0.0.1")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host)) if _NUMBERS.fullmatch(host) else None
    except OSError:
        return None


def signing_key(secret: str) -> bytes:
    """The key of a `whsec_` secret of Standard Webhooks. ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"must be {SECRET_PREFIX} and base64") from error
    if not KEY_MIN_BYTES <= len(key) <= KEY_MAX_BYTES:
        raise ValueError(f"must hold {KEY_MIN_BYTES} to {KEY_MAX_BYTES} bytes in base64 after {SECRET_PREFIX}")
    return key


def signature_headers(key: bytes, *, message_id: str, now_s: int, body: bytes) -> dict[str, str]:
    """The headers to send with the body: HMAC-SHA256 over id, time and body, as in Standard Webhooks 1.0."""
    content = f"{message_id}.{now_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(now_s), "webhook-signature": f"v1,{signature}"}


DELIVERIES: Codec[Delivery] = Codec(Delivery)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookOptions:
    sender: WebhookSender
    # The body for an ended job.
    payload: Callable[[Job], bytes]
    # Signing keys by tenant, and the key for tenants without one.
    keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    default_key: bytes = field(default=b"", repr=False)
    allowed: tuple[Network, ...] = ()

    def key_of(self, tenant: str) -> bytes:
        return self.keys.get(tenant, self.default_key)


@dataclass(slots=True)
class _KnownDelivery:
    delivery: Delivery
    revision: int
    # On the monotonic clock.
    due_s: float


class Webhooks:
    """Records deliveries of ended jobs and makes the attempts that are due."""

    def __init__(self, store: Records, clock: Clock, random_bytes: Callable[[int], bytes]) -> None:
        self._store = store
        self._clock = clock
        self._random_bytes = random_bytes
        self._options: WebhookOptions | None = None
        self._pending: dict[str, Job] = {}
        self._known: dict[str, _KnownDelivery] = {}
        self.caught_up = False
        # Deliveries that are still to be made, and how many of each tenant; jobs that have some.
        self._open: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._open_jobs: Counter[str] = Counter()
        # By key, the tenant.
        self._sending: dict[str, str] = {}
        self._is_closed: Callable[[str], bool] = lambda tenant: False

    def close_for(self, is_closed: Callable[[str], bool]) -> None:
        """Tenants that are being deleted: nothing is delivered for them."""
        self._is_closed = is_closed

    def use(self, options: WebhookOptions) -> None:
        self._options = options

    def check(self, url: str, tenant: str) -> None:
        """InvalidField and FailedPrecondition for a webhook that could never be delivered."""
        if not url:
            return
        if self._options is None or not self._options.key_of(tenant):
            raise FailedPrecondition("this gateway has no secret to sign webhooks with", field="webhook_url")
        refuse_internal(url, self._options.allowed, field="webhook_url")

    def observe(self, job: Job) -> None:
        key = _key(job)
        if job.state.ended and job.webhook_url and key not in self._known and len(self._pending) < PENDING_LIMIT:
            self._pending[key] = job
            self._note_open(key, job.tenant)

    def count_of(self, tenant: str) -> int:
        """How many webhooks of the tenant are still to be delivered."""
        return self._counts[tenant]

    def is_open(self, job_id: str) -> bool:
        """Whether a webhook of the job is still to be delivered."""
        return self._open_jobs[job_id] > 0

    def _note_open(self, key: str, tenant: str) -> None:
        if key not in self._open:
            self._open[key] = tenant
            self._counts[tenant] += 1
            self._open_jobs[_job_of(key)] += 1

    def _note_done(self, key: str) -> None:
        tenant = self._open.pop(key, None)
        if tenant is not None:
            _take_one(self._counts, tenant)
            _take_one(self._open_jobs, _job_of(key))

    async def get(self, job: Job) -> Delivery:
        """NotFound where the job has no webhook, or has not ended."""
        record = await self._store.get(BUCKET, _key(job))
        if record is None:
            raise NotFound("this job has no webhook delivery", field="name")
        return self._store.decode(DELIVERIES, BUCKET, record)

    async def forget(self, job: Job) -> None:
        """Also what is not recorded yet."""
        if job.webhook_url:
            for key in [f"{job.id}.{times}" for times in range(job.redrives + 1)]:
                if self._pending.pop(key, None) is not None:
                    self._note_done(key)
                await self._store.delete(BUCKET, key)

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if isinstance(change, CaughtUp):
                self.caught_up = True
            elif isinstance(change, Deleted):
                self._known.pop(change.key, None)
                self._note_done(change.key)
            elif delivery := self._store.read(DELIVERIES, BUCKET, change):
                self._take(change.key, delivery, change.revision)

    def _take(self, key: str, delivery: Delivery, revision: int) -> None:
        known = self._known.get(key)
        if known is None or known.revision < revision:
            wait_s = min(max(0.0, delivery.next_s - self._clock.now_s()), 2 * BACKOFF_S[-1])
            self._known[key] = _KnownDelivery(delivery, revision, self._clock.monotonic_s() + wait_s)
            if delivery.state is DeliveryState.PENDING:
                self._note_open(key, delivery.tenant)
            else:
                self._note_done(key)

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Record a delivery for each job that ended, and begin the attempts that are due."""
        if self._options is None or not self.caught_up:
            return
        for key, job in list(self._pending.items()):
            if self._is_closed(job.tenant):
                self._note_done(key)
            elif key in self._pending:
                await self._record_delivery(key, job)
            self._pending.pop(key, None)
        for key in self._due():
            known = self._known[key]
            self._sending[key] = known.delivery.tenant
            group.create_task(self._deliver(key, known, self._options))

    def _due(self) -> Sequence[str]:
        """Deliveries to begin, as far as there are places; the tenants in turns, each with its longest due ones."""
        now_s = self._clock.monotonic_s()
        by_tenant: dict[str, list[tuple[float, str]]] = {}
        for key, tenant in self._open.items():
            known = self._known.get(key)
            is_due = known is not None and known.due_s <= now_s and not self._is_closed(tenant)
            if known is not None and is_due and key not in self._sending:
                by_tenant.setdefault(tenant, []).append((known.due_s, key))
        sending = Counter(self._sending.values())
        turns = [
            (turn, due_s, key)
            for tenant, due in by_tenant.items()
            for turn, (due_s, key) in enumerate(nsmallest(SENDING_LIMIT_EACH - sending[tenant], due), sending[tenant])
        ]
        return [key for _, _, key in nsmallest(SENDING_LIMIT - len(self._sending), turns)]

    async def _record_delivery(self, key: str, job: Job) -> None:
        delivery = Delivery(id=f"msg_{key.replace('.', '_')}", job_id=job.id, url=job.webhook_url, tenant=job.tenant)
        with contextlib.suppress(AlreadyExists):
            record = await self._store.create(BUCKET, key, DELIVERIES.encode(delivery))
            self._take(key, delivery, record.revision)

    async def _deliver(self, key: str, known: _KnownDelivery, options: WebhookOptions) -> None:
        try:
            delivery = claimed(known.delivery, now_s=self._clock.now_s())
            record = await self._store.put(BUCKET, key, DELIVERIES.encode(delivery), revision=known.revision)
            self._take(key, delivery, record.revision)
            if len(delivery.tries) >= GONE_TRIES and await self._store.get(JOBS_BUCKET, delivery.job_id) is None:
                await self._drop(key)
                return
            after = attempted(delivery, await self._attempt(delivery, options), chance=self._random_bytes(1)[0] / 256)
            record = await self._store.put(BUCKET, key, DELIVERIES.encode(after), revision=record.revision)
            self._take(key, after, record.revision)
            log.info(
                "webhook_attempted", job=f"jobs/{after.job_id}", state=after.state.value, attempts=len(after.tries)
            )
        except Conflict:
            # Another gateway has claimed the attempt.
            return
        except FanlightError as error:
            log.warning("webhook_not_recorded", reason=error.reason, message=error.message)
        finally:
            self._sending.pop(key, None)

    async def _drop(self, key: str) -> None:
        """Its job was deleted meanwhile, perhaps by another gateway: nothing is left to tell, nor whom to tell it."""
        await self._store.delete(BUCKET, key)
        self._known.pop(key, None)
        self._note_done(key)
        log.info("webhook_dropped", job=f"jobs/{_job_of(key)}", why="the job was deleted")

    async def _attempt(self, delivery: Delivery, options: WebhookOptions) -> DeliveryAttempt:
        begin_s, now_s = self._clock.monotonic_s(), self._clock.now_s()
        status, error, is_refused = 0, "", False
        try:
            body = options.payload(await self._job(delivery.job_id))
            key = options.key_of(delivery.tenant)
            headers = signature_headers(key, message_id=delivery.id, now_s=int(now_s), body=body)
            status = await options.sender.post(delivery.url, headers, body)
        except FanlightError as trouble:
            error, is_refused = trouble.message, isinstance(trouble, FailedPrecondition)
        duration_s = self._clock.monotonic_s() - begin_s
        return DeliveryAttempt(time_s=now_s, status=status, error=error, is_refused=is_refused, duration_s=duration_s)

    async def _job(self, job_id: str) -> Job:
        record = await self._store.get(JOBS_BUCKET, job_id)
        if record is None:
            raise NotFound("the job is deleted", field="name")
        return self._store.decode(JOBS, JOBS_BUCKET, record)


def _key(job: Job) -> str:
    return f"{job.id}.{job.redrives}"


def _job_of(key: str) -> str:
    return key.partition(".")[0]


def _take_one(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
