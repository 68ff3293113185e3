"""Wraps a RecordStore: records that hold what tenants wrote are sealed with their tenant's data key.

Keys, buckets and revisions stay in clear, so that lists and watches work. Records in clear are read as they are, and
sealed when they are next written. One that cannot be opened is yielded with its fault, and then set aside like any
damaged record.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from fanlight.errors import Conflict, Unavailable
from services.gateway.adapters.seal_format import (
    BrokenSeal,
    SealedRecord,
    is_sealed_record,
    open_record,
    parse_record,
    seal_record,
)
from services.gateway.app.contents import CONTENT_BUCKETS, tenant_of
from services.gateway.app.data_keys import DataKeys, KeysUnreadable, TenantClosed
from services.gateway.ports import Change, NewRecord, Record, RecordStore, Seal, commits_together, store_fault
from services.kernel.logs import get_logger

log = get_logger()

RETRY_S = 1.0


class SealedStore:
    """Passes the suite in tests/contract."""

    def __init__(self, store: RecordStore, keys: DataKeys) -> None:
        self._store, self._keys = store, keys

    @property
    def fault(self) -> str:
        return store_fault(self._store)

    @property
    def commits_together(self) -> bool:
        return commits_together(self._store)

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        """TenantClosed, KeysUnreadable."""
        tenant = tenant_of(value)
        sealed, seal = await self._sealed(bucket, key, value, tenant)
        after = await self._sealed_after(after, tenant)
        return replace(await self._store.create(bucket, key, sealed, after=after), value=value, seal=seal)

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        """Conflict also where the tenant's key was destroyed: what the caller knows of the record is gone."""
        try:
            sealed, seal = await self._sealed(bucket, key, value, tenant_of(value))
        except TenantClosed as error:
            raise Conflict(error.message) from error
        after = await self._sealed_after(after, tenant_of(value))
        written = await self._store.put(bucket, key, sealed, revision=revision, after=after)
        return replace(written, value=value, seal=seal)

    async def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        await self._store.delete(bucket, key, after=await self._sealed_after(after, ""))

    async def _sealed_after(self, after: NewRecord | None, tenant: str) -> NewRecord | None:
        if after is None:
            return None
        value, _ = await self._sealed(after.bucket, after.key, after.value, tenant or tenant_of(after.value))
        return replace(after, value=value)

    async def get(self, bucket: str, key: str) -> Record | None:
        record = await self._store.get(bucket, key)
        return await self._opened(bucket, record) if record else None

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        return [await self._opened(bucket, each) for each in await self._store.list(bucket, before=before, limit=limit)]

    async def watch(self, bucket: str) -> AsyncIterator[Change]:
        async for change in self._store.watch(bucket):
            yield await self._opened_at_last(bucket, change) if isinstance(change, Record) else change

    async def _sealed(self, bucket: str, key: str, value: bytes, tenant: str) -> tuple[bytes, Seal | None]:
        if bucket not in CONTENT_BUCKETS:
            return value, None
        keys = await self._keys.for_writing(tenant)
        return seal_record(keys, bucket, key, value), Seal(tenant=tenant, number=keys.current)

    async def _opened(self, bucket: str, record: Record) -> Record:
        """Unavailable where the keys are."""
        if not is_sealed_record(record.value):
            return record
        try:
            sealed = parse_record(record.value)
            record = replace(record, seal=Seal(tenant=sealed.tenant, number=sealed.number))
            return replace(record, value=await self._open(bucket, record.key, sealed))
        except BrokenSeal as error:
            return replace(record, fault=str(error))
        except KeysUnreadable as error:
            return replace(record, fault=error.message)

    async def _open(self, bucket: str, key: str, sealed: SealedRecord) -> bytes:
        keys = await self._keys.get(sealed.tenant)
        if sealed.number > (keys.current if keys else 0) and not self._keys.is_destroyed(sealed.tenant):
            # Perhaps another gateway has made it within the last seconds.
            keys = await self._keys.get(sealed.tenant, is_fresh=True)
        if keys is None:
            raise BrokenSeal(f"it is sealed with a key of the tenant {sealed.tenant}, which is destroyed")
        return open_record(keys, bucket, key, sealed)

    async def _opened_at_last(self, bucket: str, record: Record) -> Record:
        """Retries, because a watch has no caller to report an error to."""
        while True:
            try:
                return await self._opened(bucket, record)
            except Unavailable as error:
                log.info("data_keys_not_ready", bucket=bucket, message=error.message)
                await asyncio.sleep(error.retry_after_s or RETRY_S)
