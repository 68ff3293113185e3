"""What each tenant is granted and how much of it is in use: the tenants' records, and the counts at this gateway.

Every gateway follows the records. Rates and places are counted by each gateway for itself; waiting tasks, blobs and
history are those of the store, which all gateways share.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from aiolimiter import AsyncLimiter

from fanlight.errors import AlreadyExists, Conflict, FailedPrecondition, InvalidField, ResourceExhausted
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.records import Codec, Records
from services.gateway.app.tenants import Caller
from services.gateway.config import GatewaySettings
from services.gateway.domain.tenants import LIMIT_NAMES, TenantLimits, TenantRecord
from services.gateway.ports import CaughtUp, Clock, Deleted, Record
from services.gateway.scheduler.shares import Share
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "tenants"
TENANTS: Codec[TenantRecord] = Codec(TenantRecord, key_of=lambda tenant: tenant.name)
TENANTS_LIMIT = 10_000
ROUNDS_LIMIT = 20
# Rates are averages over this time, so that a burst is possible.
RATE_WINDOW_S = 10.0
# How long a caller whose tenant has no place free should wait.
PLACE_RETRY_S = 2.0
# How many tenants' rates are remembered; the others begin again.
RATES_REMEMBERED = 10_000

Event = Callable[[TenantRecord], TenantRecord]
Granted = Callable[[str, Share], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaUse:
    """One limit of a tenant, and how much of it is used as far as this gateway knows."""

    name: str
    limit: float
    used: float
    is_own: bool


def defaults_of(settings: GatewaySettings) -> TenantLimits:
    return TenantLimits(
        waiting_tasks=settings.waiting_tasks_limit,
        requests_per_s=settings.tenant_requests_per_s,
        streams=settings.tenant_streams,
        uploads=settings.tenant_uploads,
        blob_bytes=settings.tenant_blob_bytes or settings.blob_budget_bytes // 2,
        webhooks=settings.tenant_webhooks,
        history_jobs=settings.job_retention_count,
        history_s=settings.job_retention_s,
    )


class Quotas:
    """The tenants' records, and the places that their calls take here. The operator has no limits but the gateway's."""

    def __init__(self, store: Records, clock: Clock, settings: GatewaySettings, audit: AuditLog) -> None:
        self._store, self._clock, self._audit = store, clock, audit
        self._defaults = defaults_of(settings)
        self._known: dict[str, TenantRecord] = {}
        self._rates: dict[str, AsyncLimiter] = {}
        self._places: Counter[tuple[str, str]] = Counter()
        self._meters: dict[str, Callable[[str], float]] = {}
        self._granted: list[Granted] = []

    def measure(self, name: str, used: Callable[[str], float]) -> None:
        """How much a tenant uses of a limit that is counted elsewhere."""
        assert name in LIMIT_NAMES
        self._meters[name] = used

    def on_grant(self, granted: Granted) -> None:
        """To be called with a tenant's new share."""
        self._granted.append(granted)

    async def load(self) -> None:
        before = ""
        while records := await self._store.list(BUCKET, before=before, limit=1_000):
            for record in records:
                self.take(record)
            before = records[-1].key

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if not isinstance(change, CaughtUp):
                self.take(change)

    def take(self, change: Record | Deleted) -> None:
        """Take in a change that this or another gateway made."""
        record = None if isinstance(change, Deleted) else self._store.read(TENANTS, BUCKET, change)
        if record is None:
            self._known.pop(change.key, None)
        else:
            self._note(record)

    def _note(self, tenant: TenantRecord) -> None:
        before = self._known.get(tenant.name)
        self._known[tenant.name] = tenant
        if before is None or before.limits.requests_per_s != tenant.limits.requests_per_s:
            self._rates.pop(tenant.name, None)
        for granted in self._granted:
            granted(tenant.name, self.share_of(tenant.name))

    # What is granted.

    def get(self, name: str) -> TenantRecord:
        """One without a record has the defaults."""
        return self._known.get(name) or TenantRecord(name=name)

    def limits_of(self, name: str) -> TenantLimits:
        """Every limit is set."""
        return self.get(name).limits.over(self._defaults)

    @property
    def longest_history_s(self) -> float:
        """Of all tenants."""
        own = [each.limits.history_s for each in self._known.values() if each.limits.history_s is not None]
        assert self._defaults.history_s is not None
        return max([self._defaults.history_s, *own])

    def share_of(self, name: str) -> Share:
        found = self.get(name)
        return Share(weight=found.weight, service_class=found.service_class)

    def pool_of(self, name: str) -> str:
        return self.get(name).pool

    def page(self, *, after: str, limit: int) -> Sequence[TenantRecord]:
        """By name; `after`: the last name of the page before."""
        names = sorted(name for name in self._known if name > after)
        return [self._known[name] for name in names[:limit]]

    async def change(self, name: str, event: Event) -> TenantRecord:
        """The tenant after the event; created where it has no record. FailedPrecondition while it is being deleted."""

        def granted(tenant: TenantRecord) -> TenantRecord:
            if tenant.is_closed:
                raise FailedPrecondition(f"the tenant {name} is being deleted; wait for its end", field="name")
            fresh = TenantRecord(name=name, create_s=self._clock.now_s())
            return event(fresh if tenant.deletion is not None else tenant)

        async with self._audit.change("tenants.set", f"tenants/{name}", tenant=name):
            return await self.replace(name, granted)

    def is_closed(self, name: str) -> bool:
        """Whether the tenant is being deleted."""
        return self.get(name).is_closed

    def closed(self) -> Sequence[TenantRecord]:
        """Those that are being deleted."""
        return [each for each in self._known.values() if each.is_closed]

    def deleted(self) -> Sequence[TenantRecord]:
        """Those whose deletion has ended."""
        return [each for each in self._known.values() if each.deletion is not None and each.deletion.end_s]

    def has_uploads(self, name: str) -> bool:
        """Whether blobs are being written for the tenant at this gateway."""
        return self._places[name, "uploads"] > 0

    async def replace(self, name: str, event: Event) -> TenantRecord:
        """As `change`, also while it is being deleted, and without an entry in the audit log."""
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(BUCKET, name)
            before = self._store.read(TENANTS, BUCKET, record) if record else None
            if before is None:
                self._require_room()
                before = TenantRecord(name=name, create_s=self._clock.now_s())
            after = event(before)
            if after is before and record is not None:
                return after
            try:
                if record is None:
                    await self._store.create(BUCKET, name, TENANTS.encode(after))
                else:
                    await self._store.put(BUCKET, name, TENANTS.encode(after), revision=record.revision)
            except (AlreadyExists, Conflict):
                continue
            self._note(after)
            log.info("tenant_changed", tenant=name)
            return after
        raise ResourceExhausted("the tenant changes too often at the moment; try again", retry_after_s=1.0)

    async def forget(self, name: str) -> None:
        """The tenant has the defaults again."""
        await self._store.delete(BUCKET, name)
        self._known.pop(name, None)
        self._rates.pop(name, None)
        for granted in self._granted:
            granted(name, self.share_of(name))

    def _require_room(self) -> None:
        if len(self._known) >= TENANTS_LIMIT:
            raise ResourceExhausted(f"there are {TENANTS_LIMIT:,} tenants", retry_after_s=600.0)

    # What is used.

    def uses(self, name: str) -> Sequence[QuotaUse]:
        own, limits = self.get(name).limits, self.limits_of(name)
        return [
            QuotaUse(
                name=each,
                limit=float(getattr(limits, each)),
                used=self._used(name, each),
                is_own=getattr(own, each) is not None,
            )
            for each in LIMIT_NAMES
        ]

    def _used(self, tenant: str, limit: str) -> float:
        if limit in self._meters:
            return self._meters[limit](tenant)
        if limit == "requests_per_s" and (rate := self._rates.get(tenant)) is not None:
            rate.has_capacity()
            return round(rate._level / rate.time_period, 3)  # the library tells it nowhere else
        return float(self._places[tenant, limit])

    async def take_request(self, caller: Caller) -> None:
        """Count a call of the caller's. ResourceExhausted where its tenant has sent too many of late."""
        if caller.is_operator:
            return
        rate = self._rates.get(caller.tenant)
        if rate is None:
            per_s = self.limits_of(caller.tenant).requests_per_s
            assert per_s is not None
            if len(self._rates) >= RATES_REMEMBERED:
                self._rates.pop(next(iter(self._rates)))
            rate = self._rates[caller.tenant] = AsyncLimiter(max(1.0, per_s * RATE_WINDOW_S), RATE_WINDOW_S)
        if not rate.has_capacity():
            per_s = rate.max_rate / RATE_WINDOW_S
            raise ResourceExhausted(
                f"requests_per_s: your tenant sends more than {per_s:g} requests a second",
                retry_after_s=float(math.ceil(1 / per_s)),
            )
        await rate.acquire()

    @contextmanager
    def place(self, caller: Caller, limit: str, what: str) -> Iterator[None]:
        """One of the tenant's places of that limit, `streams` or `uploads`. ResourceExhausted where all are taken."""
        key = (caller.tenant, limit)
        most = getattr(self.limits_of(caller.tenant), limit)
        if not caller.is_operator and self._places[key] >= most:
            raise ResourceExhausted(
                f"{limit}: your tenant has {self._places[key]} {what}, the most that it may have",
                retry_after_s=PLACE_RETRY_S,
            )
        self._places[key] += 1
        try:
            yield
        finally:
            self._places[key] -= 1
            if not self._places[key]:
                del self._places[key]

    def require_blob_bytes(self, caller: Caller, more: int) -> None:
        """Before a blob is written or a job is created. What workers write of it afterwards is taken all the same.

        Where the store does not count bytes by scope, nothing is refused.
        """
        if "blob_bytes" in self._meters and not caller.is_operator:
            used = self._meters["blob_bytes"](caller.tenant)
            self.require(caller, "blob_bytes", used, max(1, more), "bytes of blobs", retry_after_s=60.0)

    @contextmanager
    def upload(self, caller: Caller, size_bytes: int) -> Iterator[None]:
        """A place for a blob that a client writes. `size_bytes`: as announced; 0 for unknown. ResourceExhausted."""
        self.require_blob_bytes(caller, size_bytes)
        with self.place(caller, "uploads", "uploads"):
            yield

    def require(self, caller: Caller, limit: str, used: float, more: float, what: str, *, retry_after_s: float) -> None:
        """ResourceExhausted where `more` beside what is used would exceed the tenant's limit, for operators too."""
        most = getattr(self.limits_of(caller.tenant), limit)
        if used + more > most:
            raise ResourceExhausted(
                f"{limit}: your tenant has {used:,.0f} {what}, and may have {most:,}; try again later",
                retry_after_s=retry_after_s,
            )


def parse_limit_name(name: str, *, field: str) -> str:
    if name not in LIMIT_NAMES:
        raise InvalidField(f"must be one of {', '.join(LIMIT_NAMES)}", field=field)
    return name
