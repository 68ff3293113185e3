"""A RecordStore that is away, full or slow when the test says so."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from fanlight.errors import Unavailable
from services.gateway.ports import Change, NewRecord, Record
from tests.fakes.memory_store import MemoryStore


class MoodyStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        # Takes no writes.
        self.is_full = False
        self.hangs = False

    async def _mood(self, *, writes: bool) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_away or (self.is_full and writes):
            raise Unavailable("the store is disconnected", retry_after_s=2.0)

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        await self._mood(writes=True)
        return await super().create(bucket, key, value, after=after)

    async def get(self, bucket: str, key: str) -> Record | None:
        await self._mood(writes=False)
        return await super().get(bucket, key)

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        await self._mood(writes=True)
        return await super().put(bucket, key, value, revision=revision, after=after)

    async def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        await self._mood(writes=True)
        await super().delete(bucket, key, after=after)

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        await self._mood(writes=False)
        return await super().list(bucket, before=before, limit=limit)

    def watch(self, bucket: str) -> AsyncIterator[Change]:
        return super().watch(bucket)
