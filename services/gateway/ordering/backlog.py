"""The waiting tasks, by kind and in order of rank: adding and removing cost the logarithm of their number."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from services.gateway.ordering.tasks import Key, Kind, Waiting

_Ranked = tuple[float, Key]


class Backlog:
    def __init__(self) -> None:
        self._tasks: dict[Key, Waiting] = {}
        self._kinds: dict[Kind, list[_Ranked]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, key: Key) -> bool:
        return key in self._tasks

    def add(self, task: Waiting) -> None:
        self.remove(task.key)
        self._tasks[task.key] = task
        insort(self._kinds.setdefault(task.kind, []), (task.rank_s, task.key))

    def remove(self, key: Key) -> None:
        """No error where there is none."""
        task = self._tasks.pop(key, None)
        if task is None:
            return
        ranked = self._kinds[task.kind]
        del ranked[bisect_left(ranked, (task.rank_s, key))]
        if not ranked:
            del self._kinds[task.kind]

    def count(self, kind: Kind) -> int:
        return len(self._kinds.get(kind, ()))

    def of_kind(self, kind: Kind) -> Iterator[Waiting]:
        """In order of rank."""
        return self._in_order(self._kinds.get(kind, []))

    def by_kind(self) -> Iterator[tuple[Kind, Iterator[Waiting]]]:
        """Every kind that waits, with its tasks in order of rank."""
        return ((kind, self._in_order(ranked)) for kind, ranked in self._kinds.items())

    def _in_order(self, ranked: list[_Ranked]) -> Iterator[Waiting]:
        return (self._tasks[key] for _, key in ranked)
