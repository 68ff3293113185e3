"""The RecordStore in memory: its records end with the process."""

from collections.abc import AsyncIterator, Sequence

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.adapters.sqlite_store import Watchers
from services.gateway.ports import CaughtUp, Change, Deleted, NewRecord, Record


class MemoryStore:
    def __init__(self) -> None:
        self._buckets: dict[str, dict[str, Record]] = {}
        self._revision = 0
        self._watchers = Watchers()

    @property
    def commits_together(self) -> bool:
        return True

    def close(self) -> None:
        self._watchers.close()

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        for each in (NewRecord(bucket=bucket, key=key, value=value), *([after] if after else [])):
            if each.key in self._buckets.get(each.bucket, {}):
                raise AlreadyExists(f"{each.bucket}/{each.key} exists")
        if after:
            self._set(after.bucket, after.key, after.value)
        return self._set(bucket, key, value)

    async def get(self, bucket: str, key: str) -> Record | None:
        return self._buckets.get(bucket, {}).get(key)

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        present = self._buckets.get(bucket, {}).get(key)
        if present is None or present.revision != revision:
            raise Conflict(f"{bucket}/{key} has changed")
        self._set_before(after)
        return self._set(bucket, key, value)

    def _set_before(self, after: NewRecord | None) -> None:
        if after is None:
            return
        if after.key in self._buckets.get(after.bucket, {}):
            raise AlreadyExists(f"{after.bucket}/{after.key} exists")
        self._set(after.bucket, after.key, after.value)

    async def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        self._set_before(after)
        if self._buckets.get(bucket, {}).pop(key, None) is not None:
            self._watchers.notify(bucket, Deleted(key=key))

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        records = self._buckets.get(bucket, {})
        keys = sorted((key for key in records if not before or key < before), reverse=True)
        return [records[key] for key in keys[:limit]]

    async def watch(self, bucket: str) -> AsyncIterator[Change]:
        watcher = self._watchers.add(bucket)
        try:
            for record in list(self._buckets.get(bucket, {}).values()):
                yield record
            yield CaughtUp()
            async for change in watcher.changes():
                yield change
        finally:
            self._watchers.remove(bucket, watcher)

    def _set(self, bucket: str, key: str, value: bytes) -> Record:
        self._revision += 1
        record = Record(key=key, value=value, revision=self._revision)
        self._buckets.setdefault(bucket, {})[key] = record
        self._watchers.notify(bucket, record)
        return record
