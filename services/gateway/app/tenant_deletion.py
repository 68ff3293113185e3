"""Deletes a tenant: its callers and leases first, so that nobody reads or writes for it any more, then all its data.

A tombstone in the tenant's record says that it is being deleted, and by it every gateway closes the tenant. One of
them works on it, in rounds until one finds nothing more; another one takes over where that one stops. Each step finds
what the last one left, so that a gateway may be killed at any time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fanlight.errors import FailedPrecondition
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.contents import CONTENT_BUCKETS, contents, tenant_of
from services.gateway.app.deletion import Deletions
from services.gateway.app.job_store import JOBS_BUCKET, REQUESTS, REQUESTS_BUCKET, JobStore
from services.gateway.app.keys import Keys
from services.gateway.app.quotas import Quotas
from services.gateway.app.records import Records, UnreadableRecord
from services.gateway.app.sealing import Sealing
from services.gateway.app.tenants import OPERATOR, Caller
from services.gateway.domain.job import DEFAULT_TENANT
from services.gateway.domain.tenants import TenantDeletion as Progress
from services.gateway.domain.tenants import TenantRecord, begin_deletion
from services.gateway.ports import Clock, DirectTransfer, Record, ScopeEraser
from services.kernel.blobs import BlobStore
from services.kernel.logs import get_logger

log = get_logger()

# After how many deleted records the progress is written, and for how long a gateway then has the deletion to itself.
STEP_RECORDS = 200
TAKEOVER_S = 60.0
# Where other gateways share the store, they know of the deletion after so long, and calls that ran have ended.
SETTLE_S = 15.0
# Rounds within the call that begins it; the rest is done in the background.
CALL_ROUNDS = 3
# How long it is listed that a tenant was deleted.
REMEMBERED_S = 30 * 86_400.0
# By their records' order: a request id in clear names its job alone, so jobs go last.
_BUCKETS = (*(bucket for bucket in CONTENT_BUCKETS if bucket != JOBS_BUCKET), JOBS_BUCKET)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedTenant:
    tenant: str
    progress: Progress

    @property
    def is_done(self) -> bool:
        return bool(self.progress.end_s)


class TenantDeletions:
    def __init__(
        self,
        records: Records,
        blobs: BlobStore,
        jobs: JobStore,
        keys: Keys,
        quotas: Quotas,
        sealing: Sealing,
        deletions: Deletions,
        audit: AuditLog,
        clock: Clock,
        *,
        is_shared: bool,
        is_creating: Callable[[str], bool],
    ) -> None:
        """`is_creating`: whether jobs of the tenant are being created at this gateway."""
        self._records, self._blobs, self._jobs = records, blobs, jobs
        self._keys, self._quotas, self._sealing = keys, quotas, sealing
        self._deletions, self._audit, self._clock = deletions, audit, clock
        self._is_shared, self._is_creating = is_shared, is_creating
        # Those that this gateway works on, and those that it works on at this moment.
        self._own: set[str] = set()
        self._running: set[str] = set()

    async def delete(self, tenant: str, caller: Caller = OPERATOR) -> DeletedTenant:
        """Begins it, and ends it where that takes a moment only; otherwise the gateways go on with it.

        FailedPrecondition for the operator's own; Unavailable where a store does not answer.
        """
        async with self._audit.change("tenants.delete", f"tenants/{tenant}", tenant=tenant, caller=caller):
            if tenant == DEFAULT_TENANT:
                raise FailedPrecondition(f"{DEFAULT_TENANT} is the operator's, and stays", field="name")
            now_s = self._clock.now_s()
            record = await self._quotas.replace(tenant, lambda each: begin_deletion(each, now_s=now_s))
        log.warning("tenant_deletion_began", tenant=tenant, by=caller.name)
        self._own.add(tenant)
        for _ in range(CALL_ROUNDS):
            if record.is_closed:
                record = await self._round(tenant)
        assert record.deletion is not None
        return DeletedTenant(tenant=tenant, progress=record.deletion)

    async def run(self) -> None:
        """Go on with deletions that were begun here, or by a gateway that has stopped."""
        now_s = self._clock.now_s()
        for record in self._quotas.closed():
            assert record.deletion is not None
            is_left = not self._is_shared or now_s - record.deletion.work_s > TAKEOVER_S
            if record.name in self._own or is_left:
                self._own.add(record.name)
                await self._round(record.name)

    async def sweep(self) -> None:
        """Forget tenants that were deleted long ago."""
        now_s = self._clock.now_s()
        for record in self._quotas.deleted():
            if record.deletion is not None and record.deletion.end_s + REMEMBERED_S < now_s:
                await self._quotas.forget(record.name)

    async def _round(self, tenant: str) -> TenantRecord:
        """Delete what is found; the deletion ends with a round that finds nothing."""
        if tenant in self._running:
            return self._quotas.get(tenant)
        self._running.add(tenant)
        try:
            found, remains = await self._delete_all(tenant)
        finally:
            self._running.discard(tenant)
        record = self._quotas.get(tenant)
        if found or record.deletion is None or self._may_be_written(tenant, record.deletion):
            return record
        return await self._end(tenant, remains)

    def _may_be_written(self, tenant: str, progress: Progress) -> bool:
        """Calls that began before the deletion may still write for the tenant."""
        is_young = self._is_shared and self._clock.now_s() - progress.begin_s < SETTLE_S
        return is_young or self._quotas.has_uploads(tenant) or self._is_creating(tenant)

    async def _delete_all(self, tenant: str) -> tuple[int, Sequence[str]]:
        """How much it was, and what is left in the stores."""
        self._jobs.drop_unwritten(tenant)
        open_jobs = [job for job in self._jobs.open_jobs if job.tenant == tenant]
        for job in open_jobs:
            # Its leases end with it. The job itself is in memory, so its data key is not needed.
            await self._deletions.forget(job)
        api_keys = await self._keys.forget_tenant(tenant)
        known = self._quotas.get(tenant).deletion
        is_destroyed = (known is None or not known.is_key_destroyed) and await self._sealing.destroy(tenant)
        await self._count(tenant, Progress(begin_s=0, api_keys=api_keys, records=len(open_jobs)), is_destroyed)
        records, clear = await self._delete_records(tenant)
        blobs, remains = 0, []
        if isinstance(self._blobs, ScopeEraser):
            erased = await self._blobs.erase(tenant)
            blobs = erased.blobs
            await self._count(tenant, Progress(begin_s=0, blobs=blobs))
            if erased.remaining:
                remains.append(f"{erased.remaining} blobs could not be deleted; see the gateway's log")
            if erased.kept:
                remains.append(erased.kept)
        if clear and self._sealing.is_on:
            remains.append(f"backups may hold {clear} of its records in clear, from before they were sealed")
        if remains:
            await self._count(tenant, Progress(begin_s=0, remains=tuple(remains)))
        return len(open_jobs) + api_keys + records + blobs, remains

    async def _delete_records(self, tenant: str) -> tuple[int, int]:
        """How many, and how many of them were in clear."""
        jobs = {each.key async for each in contents(self._records, JOBS_BUCKET) if _is_of(each, tenant)}
        deleted = clear = counted = 0
        for bucket in _BUCKETS:
            async for record in contents(self._records, bucket):
                is_own = record.key in jobs if bucket == JOBS_BUCKET else _is_of(record, tenant)
                if not is_own and not (bucket == REQUESTS_BUCKET and _names_one_of(record, jobs)):
                    continue
                if bucket == JOBS_BUCKET:
                    await self._jobs.forget(record.key)
                else:
                    await self._records.delete(bucket, record.key)
                deleted += 1
                clear += record.seal is None
                if deleted - counted >= STEP_RECORDS:
                    await self._count(tenant, Progress(begin_s=0, records=deleted - counted))
                    counted = deleted
        await self._count(tenant, Progress(begin_s=0, records=deleted - counted))
        return deleted, clear

    async def _count(self, tenant: str, more: Progress, is_key_destroyed: bool = False) -> None:
        """Write down how far it is, which also tells the other gateways that this one works on it."""
        now_s = self._clock.now_s()

        def counted(record: TenantRecord) -> TenantRecord:
            known = record.deletion
            if known is None or not record.is_closed:
                return record
            progress = replace(
                known,
                work_s=now_s,
                records=known.records + more.records,
                blobs=known.blobs + more.blobs,
                api_keys=known.api_keys + more.api_keys,
                is_key_destroyed=known.is_key_destroyed or is_key_destroyed,
                remains=tuple(dict.fromkeys((*known.remains, *more.remains))),
            )
            return replace(record, deletion=progress)

        await self._quotas.replace(tenant, counted)

    async def _end(self, tenant: str, remains: Sequence[str]) -> TenantRecord:
        """The name can be used again."""
        now_s = self._clock.now_s()

        def ended(record: TenantRecord) -> TenantRecord:
            if record.deletion is None or not record.is_closed:
                return record
            left = tuple(dict.fromkeys((*remains, *_lasting(record.deletion.remains), *self._remains(tenant))))
            return replace(record, deletion=replace(record.deletion, end_s=now_s, remains=left))

        async with self._audit.change("tenants.deleted", f"tenants/{tenant}", tenant=tenant) as change:
            record = await self._quotas.replace(tenant, ended)
            assert record.deletion is not None
            change.detail = f"{record.deletion.records} records, {record.deletion.blobs} blobs"
        self._own.discard(tenant)
        log.warning("tenant_deleted", tenant=tenant, records=record.deletion.records, blobs=record.deletion.blobs)
        return record

    def _remains(self, tenant: str) -> Sequence[str]:
        found = []
        if self._keys.has_token(tenant):
            found.append("its token in FANLIGHT_GATEWAY_TENANTS_FILE still works; take it out and restart the gateways")
        if not self._sealing.is_on:
            found.append("backups hold its data in clear, because nothing is sealed here; delete it there too")
        if isinstance(self._blobs, DirectTransfer):
            found.append("addresses that were signed before work for 15 minutes; delete it again after that")
        found.append("the audit log names the tenant until its entries are deleted by age")
        return found


def _lasting(remains: Sequence[str]) -> Sequence[str]:
    """Blobs that could not be deleted before are gone once a round finds nothing."""
    return [each for each in remains if "could not be deleted" not in each]


def _is_of(record: Record, tenant: str) -> bool:
    return (record.seal.tenant if record.seal is not None else tenant_of(record.value)) == tenant


def _names_one_of(record: Record, jobs: set[str]) -> bool:
    """A request id in clear names its job alone."""
    if record.seal is not None:
        return False
    try:
        return REQUESTS.decode_record(record).job_id in jobs
    except UnreadableRecord:
        return False
