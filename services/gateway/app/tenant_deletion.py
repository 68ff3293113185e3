"""Deletes a tenant: its keys first, so that nobody reads or writes for it any more, then what is left of its data.

Killed in the middle, it is called again: each step finds what the last call left.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fanlight.errors import FailedPrecondition
from services.gateway.app.contents import CONTENT_BUCKETS, contents, tenant_of
from services.gateway.app.job_store import JOBS_BUCKET, REQUESTS, REQUESTS_BUCKET, JobStore
from services.gateway.app.keys import Keys
from services.gateway.app.quotas import Quotas
from services.gateway.app.records import Records, UnreadableRecord
from services.gateway.app.sealing import Sealing
from services.gateway.domain.job import DEFAULT_TENANT
from services.gateway.ports import Record, ScopeEraser
from services.kernel.blobs import BlobStore
from services.kernel.logs import get_logger

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedTenant:
    tenant: str
    # Its data key is gone, so that no copy of its sealed data can be read.
    is_key_destroyed: bool
    # API keys and sessions.
    api_keys: int
    # Deleted, by bucket.
    records: Mapping[str, int]
    blobs: int
    # What is left, and what to do about it: sentences for the operator.
    remains: Sequence[str]


class TenantDeletion:
    def __init__(
        self, records: Records, jobs: JobStore, blobs: BlobStore, keys: Keys, quotas: Quotas, sealing: Sealing
    ) -> None:
        self._records, self._jobs, self._blobs = records, jobs, blobs
        self._keys, self._quotas, self._sealing = keys, quotas, sealing

    async def delete(self, tenant: str) -> DeletedTenant:
        """FailedPrecondition for the operator's own; Unavailable where a store does not answer: call it again."""
        if tenant == DEFAULT_TENANT:
            raise FailedPrecondition(f"{DEFAULT_TENANT} is the operator's, and stays", field="name")
        api_keys = await self._keys.forget_tenant(tenant)
        self._jobs.drop_unwritten(tenant)
        is_destroyed = await self._sealing.destroy(tenant)
        deleted, clear = await self._delete_records(tenant)
        remains = []
        blobs = 0
        if isinstance(self._blobs, ScopeEraser):
            erased = await self._blobs.erase(tenant)
            blobs = erased.blobs
            if erased.remaining:
                remains.append(
                    f"{erased.remaining} blobs could not be deleted; see the gateway's log, and delete again"
                )
        await self._quotas.forget(tenant)
        log.warning("tenant_deleted", tenant=tenant, records=deleted.total(), blobs=blobs, key_destroyed=is_destroyed)
        return DeletedTenant(
            tenant=tenant,
            is_key_destroyed=is_destroyed,
            api_keys=api_keys,
            records=deleted,
            blobs=blobs,
            remains=[*remains, *self._remains(tenant, clear)],
        )

    async def _delete_records(self, tenant: str) -> tuple[Counter[str], int]:
        """How many by bucket, and how many of them were in clear."""
        deleted, clear = Counter[str](), 0
        jobs: set[str] = set()
        for bucket in CONTENT_BUCKETS:
            async for record in contents(self._records, bucket):
                if not _is_of(record, bucket, tenant, jobs):
                    continue
                if bucket == JOBS_BUCKET:
                    jobs.add(record.key)
                await self._records.delete(bucket, record.key)
                deleted[bucket] += 1
                clear += record.seal is None
        return deleted, clear

    def _remains(self, tenant: str, clear: int) -> Sequence[str]:
        found = []
        if self._keys.has_token(tenant):
            found.append("its token in FANLIGHT_GATEWAY_TENANTS_FILE still works; take it out and restart the gateways")
        if not self._sealing.is_on:
            found.append("backups hold its data in clear, because nothing is sealed here; delete it there too")
        elif clear:
            found.append(f"backups may hold {clear} of its records in clear, from before they were sealed")
        return found


def _is_of(record: Record, bucket: str, tenant: str, jobs: set[str]) -> bool:
    """`jobs`: the tenant's. A request id in clear names its job alone."""
    if record.seal is not None:
        return record.seal.tenant == tenant
    if bucket != REQUESTS_BUCKET:
        return tenant_of(record.value) == tenant
    try:
        return REQUESTS.decode_record(record).job_id in jobs
    except UnreadableRecord:
        return False
