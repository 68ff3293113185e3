"""Which records hold what tenants wrote, and whose each is. Knows no store."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from services.gateway.app import control_cache, dead_letters, job_store, webhooks
from services.gateway.domain.job import DEFAULT_TENANT
from services.gateway.ports import Record, RecordStore

PAGE = 200
# Other buckets hold nothing that tenants wrote.
CONTENT_BUCKETS = (
    job_store.JOBS_BUCKET,
    # Made together with its job, whose tenant it has.
    job_store.REQUESTS_BUCKET,
    dead_letters.BUCKET,
    webhooks.BUCKET,
    # The tenant is the scope of the image.
    control_cache.BUCKET,
)


# As much of a record's JSON as names its tenant.


@dataclass(frozen=True, slots=True)
class _Blob:
    scope: str = ""


@dataclass(frozen=True, slots=True)
class _Value:
    tenant: str = ""
    blob: _Blob = field(default_factory=_Blob)


@dataclass(frozen=True, slots=True)
class _Content:
    value: _Value


_CONTENT: TypeAdapter[_Content] = TypeAdapter(_Content)


def tenant_of(value: bytes) -> str:
    """Whose content it is. What names no tenant is the operator's."""
    try:
        content = _CONTENT.validate_json(value)
    except ValidationError:
        return DEFAULT_TENANT
    return content.value.tenant or content.value.blob.scope or DEFAULT_TENANT


async def contents(store: RecordStore, bucket: str) -> AsyncIterator[Record]:
    """All records of the bucket, page by page."""
    before = ""
    while records := await store.list(bucket, before=before, limit=PAGE):
        for record in records:
            yield record
        before = records[-1].key
