"""Watches of a store's buckets inside this process. A watcher's backlog is bounded by the number of keys."""

import asyncio
from collections.abc import AsyncIterator

from services.gateway.ports import Deleted, Record

_Change = Record | Deleted


class Watcher:
    def __init__(self) -> None:
        # Undelivered: the last change of each key.
        self._pending: dict[str, _Change] = {}
        self._woken = asyncio.Event()
        self._closed = False

    def notify(self, change: _Change) -> None:
        self._pending.pop(change.key, None)
        self._pending[change.key] = change
        self._woken.set()

    def close(self) -> None:
        self._closed = True
        self._woken.set()

    async def changes(self) -> AsyncIterator[_Change]:
        """Ends when closed."""
        while not self._closed:
            await self._woken.wait()
            self._woken.clear()
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))


class Watchers:
    def __init__(self) -> None:
        self._watchers: dict[str, list[Watcher]] = {}

    def add(self, bucket: str) -> Watcher:
        watcher = Watcher()
        self._watchers.setdefault(bucket, []).append(watcher)
        return watcher

    def remove(self, bucket: str, watcher: Watcher) -> None:
        self._watchers[bucket].remove(watcher)

    def notify(self, bucket: str, change: _Change) -> None:
        for watcher in self._watchers.get(bucket, ()):
            watcher.notify(change)

    def close(self) -> None:
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.close()
