"""The waiting tasks, in lines: one for each checkpoint, and one for each kind of work that needs none.

Adding and removing cost the logarithm of a line's length.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import nsmallest

from services.gateway.ordering.tasks import Key, Kind, Waiting

# A checkpoint; or for work without one, what it needs.
LineId = tuple[str, str] | tuple[str, frozenset[str]]


def line_of(kind: Kind) -> LineId:
    return (kind.stage, kind.checkpoint) if kind.checkpoint else (kind.stage, kind.needs)


class Lines:
    def __init__(self) -> None:
        self._tasks: dict[Key, Waiting] = {}
        self._lines: dict[LineId, list[tuple[float, Key]]] = {}
        # Those of stages without checkpoints.
        self._plain: dict[str, set[LineId]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, key: Key) -> bool:
        return key in self._tasks

    def get(self, key: Key) -> Waiting | None:
        return self._tasks.get(key)

    def add(self, task: Waiting) -> None:
        assert task.key not in self._tasks
        self._tasks[task.key] = task
        which = line_of(task.kind)
        line = self._lines.get(which)
        if line is None:
            line = self._lines[which] = []
            if not task.kind.checkpoint:
                self._plain.setdefault(task.kind.stage, set()).add(which)
        insort(line, (task.rank_s, task.key))

    def remove(self, key: Key) -> Waiting | None:
        task = self._tasks.pop(key, None)
        if task is None:
            return None
        which = line_of(task.kind)
        line = self._lines[which]
        del line[bisect_left(line, (task.rank_s, key))]
        if not line:
            del self._lines[which]
            if not task.kind.checkpoint:
                self._plain[task.kind.stage].discard(which)
        return task

    def length(self, which: LineId) -> int:
        return len(self._lines.get(which, ()))

    def place(self, task: Waiting) -> int:
        """How many of its line come before it."""
        return bisect_left(self._lines[line_of(task.kind)], (task.rank_s, task.key))

    def first(self, which: LineId, count: int) -> list[Waiting]:
        """Up to that many of a line, in order of rank."""
        return [self._tasks[key] for _, key in self._lines.get(which, ())[:count]]

    def oldest(self, stage: str, held: frozenset[str], count: int) -> list[LineId]:
        """Of the lines that the holder of some checkpoints could serve, those whose first task ranks first."""
        return nsmallest(count, self._for_holder(stage, held), key=lambda which: self._lines[which][0])

    def _for_holder(self, stage: str, held: frozenset[str]) -> Iterator[LineId]:
        """The lines of the checkpoints that a worker holds, and of work that needs none."""
        yield from list(self._plain.get(stage, ()))
        if len(held) <= len(self._lines):
            yield from [(stage, model) for model in held if (stage, model) in self._lines]
        else:
            yield from [which for which in self._lines if which[0] == stage and which[1] in held]
