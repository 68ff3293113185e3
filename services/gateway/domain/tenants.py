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
