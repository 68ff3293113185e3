"""Wraps a RecordStore with a timeout for each call, so that a hanging disk does not hang the gateway."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

from fanlight.errors import Unavailable
from services.gateway.ports import Change, NewRecord, Record, RecordStore

TIMEOUT_S = 10.0
RETRY_AFTER_S = 5.0

T = TypeVar("T")


class TimeoutStore:
    """Unavailable after the timeout. The call may still take effect later; compare-and-set makes that harmless."""

    def __init__(self, store: RecordStore, *, timeout_s: float = TIMEOUT_S) -> None:
        self._store = store
        self._timeout_s = timeout_s

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        return await self._with_timeout(self._store.create(bucket, key, value, after=after))

    async def get(self, bucket: str, key: str) -> Record | None:
        return await self._with_timeout(self._store.get(bucket, key))

    async def put(self, bucket: str, key: str, value: bytes, *, revision: int) -> Record:
        return await self._with_timeout(self._store.put(bucket, key, value, revision=revision))

    async def delete(self, bucket: str, key: str) -> None:
        await self._with_timeout(self._store.delete(bucket, key))

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        return await self._with_timeout(self._store.list(bucket, before=before, limit=limit))

    def watch(self, bucket: str) -> AsyncIterator[Change]:
        return self._store.watch(bucket)

    async def _with_timeout(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except TimeoutError as error:
            message = f"the store did not answer within {self._timeout_s:g} s"
            raise Unavailable(message, retry_after_s=RETRY_AFTER_S) from error
