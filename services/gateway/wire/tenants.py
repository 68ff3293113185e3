"""TenantService's messages: protobuf to domain and back."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from google.protobuf.message import Message

from fanlight.contract.limits import check_bytes, check_number, check_whole
from fanlight.contract.names import parse_scope
from fanlight.errors import InvalidField, PermissionDenied
from fanlight.tenants.v1 import tenants_pb2
from services.gateway.app.quotas import QuotaUse, parse_limit_name
from services.gateway.app.sealing import SealReport
from services.gateway.app.tenant_deletion import DeletedTenant
from services.gateway.app.tenants import Caller
from services.gateway.domain.moderation import POLICIES, Policy
from services.gateway.domain.tenants import LIMIT_NAMES, TenantDeletion, TenantLimits, TenantRecord
from services.gateway.wire.answers import moment

NOTE_LIMIT_BYTES = 128
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0
SERVICE_CLASS_MAX = 9
PAGE_SIZE, PAGE_SIZE_LIMIT = 50, 100
# The least and the most of each limit.
RANGES = {
    "waiting_tasks": (1, 10_000_000),
    "requests_per_s": (0.1, 1e6),
    "streams": (1, 100_000),
    "uploads": (1, 100_000),
    "blob_bytes": (1, 1 << 60),
    "webhooks": (0, 10_000_000),
    "history_jobs": (1, 10_000_000),
    "history_s": (1.0, 10 * 365 * 86_400.0),
}
_POOL = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_POOL_RULE = "must be 1 to 63 of a-z, 0-9 and -, not starting with -"


def name(text: str, *, field: str) -> str:
    return parse_scope(text, field=field)


def quota_of(caller: Caller, named: str) -> str:
    """The tenant whose quota is asked for. PermissionDenied for another one than the caller's own."""
    found = name(named, field="tenant") if named else caller.tenant
    if found != caller.tenant and not caller.is_operator:
        raise PermissionDenied("other tenants' quotas are the operator's; leave it out for your own", field="tenant")
    return found


def change(request: tenants_pb2.SetTenantRequest) -> Callable[[TenantRecord], TenantRecord]:
    """What the request does to a tenant. InvalidField."""
    given: dict[str, object] = {}
    if request.HasField("weight"):
        given["weight"] = check_number(request.weight, WEIGHT_MIN, WEIGHT_MAX, field="weight")
    if request.HasField("service_class"):
        given["service_class"] = check_whole(request.service_class, 0, SERVICE_CLASS_MAX, field="service_class")
    if request.HasField("pool"):
        if request.pool and not _POOL.fullmatch(request.pool):
            raise InvalidField(_POOL_RULE, field="pool")
        given["pool"] = request.pool
    if request.HasField("policy"):
        given["policy"] = _policy(request.policy)
    if request.HasField("policy_pool"):
        if request.policy_pool and not _POOL.fullmatch(request.policy_pool):
            raise InvalidField(_POOL_RULE, field="policy_pool")
        given["policy_pool"] = request.policy_pool
    if request.HasField("note"):
        check_bytes(request.note, NOTE_LIMIT_BYTES, field="note")
        given["note"] = "".join(each if each.isprintable() else " " for each in request.note)
    limits = _limits(request)

    def changed(tenant: TenantRecord) -> TenantRecord:
        after = replace(tenant, **given, limits=replace(tenant.limits, **limits))  # type: ignore[arg-type]  # by name
        if after.pool and after.policy_pool not in ("", after.pool):
            raise InvalidField(f"is {after.policy_pool}; the tenant is bound to {after.pool}", field="policy_pool")
        return after

    return changed


def _policy(text: str) -> Policy | None:
    """None: the gateway's default."""
    if text and text not in POLICIES:
        raise InvalidField(f"must be one of {', '.join(POLICIES)}, or empty for the default", field="policy")
    return Policy(text) if text else None


def _limits(request: tenants_pb2.SetTenantRequest) -> dict[str, object]:
    found: dict[str, object] = {
        parse_limit_name(each, field=f"clear_limits[{index}]"): None for index, each in enumerate(request.clear_limits)
    }
    limits: Message = request.limits
    for each in LIMIT_NAMES:
        if not limits.HasField(each):
            continue
        if each in found:
            raise InvalidField("is set and cleared at once", field=f"limits.{each}")
        low, high = RANGES[each]
        check = check_number if isinstance(low, float) else check_whole
        found[each] = check(getattr(request.limits, each), low, high, field=f"limits.{each}")
    return found


def page_size(request: tenants_pb2.ListTenantsRequest) -> int:
    return check_whole(request.page_size, 0, PAGE_SIZE_LIMIT, field="page_size") or PAGE_SIZE


def page(found: Sequence[TenantRecord], size: int) -> tenants_pb2.ListTenantsResponse:
    return tenants_pb2.ListTenantsResponse(
        tenants=[tenant(each) for each in found], next_page_token=found[-1].name if len(found) == size else ""
    )


def tenant(value: TenantRecord) -> tenants_pb2.Tenant:
    message = tenants_pb2.Tenant(
        name=value.name,
        limits=_limits_message(value.limits),
        weight=value.weight,
        service_class=value.service_class,
        pool=value.pool,
        note=value.note,
        policy=value.policy or "",
        policy_pool=value.policy_pool,
    )
    create_time = moment(value.create_s)
    if create_time is not None:
        message.create_time.CopyFrom(create_time)
    if value.deletion is not None:
        message.deletion.CopyFrom(_deletion(value.deletion))
    return message


def _deletion(value: TenantDeletion) -> tenants_pb2.TenantDeletion:
    return tenants_pb2.TenantDeletion(
        begin_time=moment(value.begin_s),
        end_time=moment(value.end_s),
        records=value.records,
        blobs=value.blobs,
        api_keys=value.api_keys,
        is_key_destroyed=value.is_key_destroyed,
        remains=value.remains,
    )


def _limits_message(limits: TenantLimits) -> tenants_pb2.TenantLimits:
    own = {each: getattr(limits, each) for each in LIMIT_NAMES}
    return tenants_pb2.TenantLimits(**{each: value for each, value in own.items() if value is not None})


def quota(tenant_name: str, uses: Sequence[QuotaUse]) -> tenants_pb2.Quota:
    assert all(math.isfinite(each.used) and math.isfinite(each.limit) for each in uses)
    return tenants_pb2.Quota(
        tenant=tenant_name,
        lines=[
            tenants_pb2.QuotaLine(name=each.name, limit=each.limit, used=each.used, is_own=each.is_own) for each in uses
        ],
    )


def deleted(value: DeletedTenant) -> tenants_pb2.DeleteTenantResponse:
    progress = value.progress
    return tenants_pb2.DeleteTenantResponse(
        tenant=value.tenant,
        is_key_destroyed=progress.is_key_destroyed,
        api_keys=progress.api_keys,
        records=progress.records,
        blobs=progress.blobs,
        remains=progress.remains,
        is_done=value.is_done,
    )


def sealing(value: SealReport) -> tenants_pb2.Sealing:
    return tenants_pb2.Sealing(
        is_on=value.is_on,
        vault=value.place,
        wrapped_by=value.wrapped_by,
        tenants=[
            tenants_pb2.TenantDataKeys(
                tenant=each.tenant,
                current=each.current,
                older=each.older,
                wrapped_by=sorted(each.wrapped_by),
                is_destroyed=each.is_destroyed,
                fault=each.fault,
            )
            for each in value.tenants
        ],
        clear_records=value.clear_records,
        clear_blobs=value.clear_blobs,
        lost_records=value.lost_records,
    )
