"""What an operator grants a tenant. Pure: no clock, no store, no transport."""

from dataclasses import dataclass, field, fields, replace

from services.gateway.domain.moderation import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None: the gateway's default."""

    # Tasks that wait.
    waiting_tasks: int | None = None
    # Calls of every kind, on the average over ten seconds, at each gateway.
    requests_per_s: float | None = None
    # Watches and waits at a time, at each gateway.
    streams: int | None = None
    # Blobs that are being written at a time, at each gateway.
    uploads: int | None = None
    blob_bytes: int | None = None
    # Webhooks that are being delivered or will be.
    webhooks: int | None = None
    # Ended jobs that are kept, and for how long.
    history_jobs: int | None = None
    history_s: float | None = None

    def over(self, defaults: "TenantLimits") -> "TenantLimits":
        """With the defaults in place of what is unset."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(defaults, **{name: value for name, value in own.items() if value is not None})


LIMIT_NAMES = tuple(each.name for each in fields(TenantLimits))


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantDeletion:
    """How far the deletion of a tenant is. The tenant is closed from its begin to its end."""

    begin_s: float
    # 0 while it goes on.
    end_s: float = 0.0
    # When a gateway last worked on it.
    work_s: float = 0.0
    records: int = 0
    blobs: int = 0
    api_keys: int = 0
    is_key_destroyed: bool = False
    # What is left, and what to do about it: sentences for the operator.
    remains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRecord:
    name: str
    # 0: it has no record yet.
    create_s: float = 0.0
    limits: TenantLimits = field(default_factory=TenantLimits)
    weight: float = 1.0
    service_class: int = 0
    # Empty: its jobs go to nodes of any pool.
    pool: str = ""
    note: str = ""
    # None: the gateway's default.
    policy: Policy | None = None
    # While the policy is not off, its jobs go to nodes of this pool only. Empty: any, or `pool`.
    policy_pool: str = ""
    # None where it was never deleted, or has been made again since.
    deletion: TenantDeletion | None = None

    @property
    def is_closed(self) -> bool:
        """It is being deleted: nobody acts for it, and it cannot be made again yet."""
        return self.deletion is not None and not self.deletion.end_s


def begin_deletion(tenant: TenantRecord, *, now_s: float) -> TenantRecord:
    """What it was granted is gone; what was counted is kept where it has begun already."""
    if tenant.is_closed:
        return tenant
    return TenantRecord(
        name=tenant.name, create_s=tenant.create_s, deletion=TenantDeletion(begin_s=now_s, work_s=now_s)
    )
