"""Which entries a cache has, their bytes, and which of them was not used for the longest time. Pure."""

import heapq
from dataclasses import dataclass

# Marks of uses that are no longer the last are thrown away when they are so many more than the entries.
STALE_LIMIT = 1_000


@dataclass(frozen=True, slots=True, order=True)
class Use:
    time_s: float
    # Of two at the same time the one told first is the older.
    number: int
    key: str


class Uses:
    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._last: dict[str, Use] = {}
        self._marks: list[Use] = []
        self._told = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._last)

    def note(self, key: str, size_bytes: int, used_s: float) -> None:
        """It is there, and was used then or later."""
        last = self._last.get(key)
        if last is not None and last.time_s > used_s:
            used_s = last.time_s
        self.size_bytes += size_bytes - self._sizes.get(key, 0)
        self._sizes[key] = size_bytes
        self._told += 1
        self._last[key] = Use(used_s, self._told, key)
        heapq.heappush(self._marks, self._last[key])
        if len(self._marks) > 2 * len(self._last) + STALE_LIMIT:
            self._marks = list(self._last.values())
            heapq.heapify(self._marks)

    def drop(self, key: str) -> None:
        self._last.pop(key, None)
        self.size_bytes -= self._sizes.pop(key, 0)

    def oldest(self) -> Use:
        """The last use of the entry whose last use is longest ago; there must be one."""
        while self._last.get(self._marks[0].key) is not self._marks[0]:
            heapq.heappop(self._marks)
        return self._marks[0]
