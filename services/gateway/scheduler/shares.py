"""Fair shares between tenants: a rank for every waiting task, by start-time fair queueing. Pure.

Each waiting task has a place in virtual time, spaced by what a task takes over its tenant's weight (Goyal, Vin and
Cheng, "Start-time Fair Queuing", 1996). A tenant's places are its own: its priorities decide which of its tasks has
which of them, and move no other tenant's task. A tenant with nothing waiting begins where the tenants stand whose work
it competes with, so that it waits for none of their later tasks, however long their queues are, and however long tasks
take. Its first task goes before theirs of every kind, because the worker that takes it may be at another kind; the next
ones before theirs of the same kind.
"""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from services.gateway.scheduler.queue import Key, WaitingTask

# A step of priority is worth this much waiting, so that every waiting task of a tenant comes first in the end.
PRIORITY_STEP_S = 30.0
# What one task takes in virtual time, at weight 1. Only its ratio to others' matters.
TASK_COST = 1.0
# A newcomer's place before those that it competes with.
BEFORE = 1e-6
# Classes of service are so far apart that one never reaches the next.
CLASS_STEP = 1e9
# A task of no tenant, such as a check of a result, waits behind this many of each tenant's.
BEHIND_TASKS = 600.0
# A lone newcomer begins at the least place among this many tasks that were leased last.
LEASED_REMEMBERED = 64
# A task's place in its tenant's own order: its time less its priority, its arrival, its key.
Own = tuple[float, int, Key]
# Looks at waiting tasks only where it matters.
Look = Callable[[], Iterable[WaitingTask]]
# Nobody's: work that takes nothing of a tenant's share.
NOBODY = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What an operator grants a tenant. A higher class goes before all lower ones."""

    weight: float = 1.0
    service_class: int = 0


def equal_share(tenant: str) -> Share:
    return Share()


@dataclass(slots=True)
class _Line:
    """A tenant's waiting tasks in its own order, and as many places; the first task has the first place."""

    share: Share
    order: list[Own] = field(default_factory=list)
    places: list[float] = field(default_factory=list)
    # Where its next task would come.
    end: float = 0.0


@dataclass(slots=True)
class _Entry:
    tenant: str
    # Its place in the tenant's own order.
    own: Own
    # As it was last given out.
    rank: float
    waits: bool = True


class Shares:
    """Ranks of tasks, by key. A rank that was given out may change later: see `pop_moved`."""

    def __init__(self, share_of: Callable[[str], Share]) -> None:
        self._share_of = share_of
        self._lines: dict[str, _Line] = {}
        self._entries: dict[Key, _Entry] = {}
        # Of two tasks that came at one time, the one that was seen first goes first.
        self._arrivals = itertools.count()
        # How many tasks of each tenant are known, waiting or leased.
        self._open: dict[str, int] = {}
        self._leased: deque[float] = deque(maxlen=LEASED_REMEMBERED)
        # Tenants some of whose tasks may have another rank than was given out; and from which of their tasks on.
        self._moved: dict[str, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def waiting_of(self, tenant: str) -> int:
        line = self._lines.get(tenant)
        return len(line.order) if line else 0

    def enter(
        self,
        key: Key,
        tenant: str,
        *,
        create_time_s: float,
        priority: int,
        among: Look,
        fronts: Look = tuple,
    ) -> float:
        """The rank of a task that waits, which it keeps or gets back where it was known.

        `among`: the first tasks of the queue that it joins, by rank. `fronts`: those of all the queues of its stage.
        """
        entry = self._entries.get(key)
        if entry is None:
            own = (create_time_s - priority * PRIORITY_STEP_S, next(self._arrivals), key)
            entry = self._entries[key] = _Entry(tenant=tenant, own=own, rank=0.0, waits=False)
            self._open[tenant] = self._open.get(tenant, 0) + 1
            start = self._start(tenant, among)
            entry.rank = self._join(entry, self._first(tenant, start, fronts), end=start)
            entry.waits = True
        elif not entry.waits:
            # It was leased and comes back: to the place that it had.
            entry.rank = self._join(entry, self._place(entry))
            entry.waits = True
        return entry.rank

    def would_enter(self, tenant: str, among: Look, fronts: Look = tuple) -> float:
        """The rank of a task that does not wait yet, if it came now."""
        return _rank(self._share_of(tenant), self._first(tenant, self._start(tenant, among), fronts))

    def leave(self, key: Key) -> None:
        """It waits no more, because it was leased; its place goes with it."""
        entry = self._entries.get(key)
        if entry is None or not entry.waits:
            return
        entry.waits = False
        if entry.tenant == NOBODY:
            return
        line = self._lines[entry.tenant]
        index = bisect_left(line.order, entry.own)
        entry.rank = _rank(line.share, line.places[index])
        del line.order[index], line.places[index]
        if entry.tenant in self._moved:
            self._note_moved(entry.tenant, max(0, self._moved[entry.tenant] - 1))
        self._leased.append(self._place(entry))

    def forget(self, key: Key) -> None:
        """It has ended. A tenant of which nothing is left owes nothing for what it got."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.waits and entry.tenant != NOBODY:
            self._withdraw(entry)
        self._open[entry.tenant] -= 1
        if not self._open[entry.tenant]:
            del self._open[entry.tenant]
            self._lines.pop(entry.tenant, None)
            self._moved.pop(entry.tenant, None)

    def _withdraw(self, entry: _Entry) -> None:
        """It ended while it waited, so nothing was given for it: the tenant's last place is free again."""
        line = self._lines[entry.tenant]
        index = bisect_left(line.order, entry.own)
        del line.order[index]
        line.end = line.places.pop()
        if index < len(line.order):
            self._note_moved(entry.tenant, index)

    def grant(self, tenant: str, share: Share) -> None:
        """The operator changed what the tenant gets."""
        line = self._lines.get(tenant)
        if line is not None and line.share != share:
            line.share = share
            self._note_moved(tenant, 0)

    def rank_of(self, key: Key) -> float:
        return self._entries[key].rank

    def pop_moved(self, limit: int) -> list[Key]:
        """At most so many waiting tasks whose rank is another one by now; call it again for more."""
        moved: list[Key] = []
        for tenant in list(self._moved):
            line = self._lines[tenant]
            index = self._moved.pop(tenant)
            while index < len(line.order) and len(moved) < limit:
                entry = self._entries[line.order[index][2]]
                rank = _rank(line.share, line.places[index])
                if rank != entry.rank:
                    entry.rank = rank
                    moved.append(line.order[index][2])
                index += 1
            if index < len(line.order):
                self._moved[tenant] = index
                break
        return moved

    def _join(self, entry: _Entry, place: float, *, end: float = -math.inf) -> float:
        """`end`: the least place of the tenant's next task."""
        if entry.tenant == NOBODY:
            return place
        line = self._lines.setdefault(entry.tenant, _Line(share=self._share_of(entry.tenant)))
        at = bisect_right(line.places, place)
        line.places.insert(at, place)
        line.end = max(line.end, end, place + TASK_COST / line.share.weight)
        index = bisect_left(line.order, entry.own)
        line.order.insert(index, entry.own)
        if at != index or index < len(line.order) - 1:
            self._note_moved(entry.tenant, min(at, index))
        return _rank(line.share, line.places[index])

    def _note_moved(self, tenant: str, index: int) -> None:
        self._moved[tenant] = min(index, self._moved.get(tenant, index))

    def _place(self, entry: _Entry) -> float:
        line = self._lines.get(entry.tenant)
        return entry.rank + line.share.service_class * CLASS_STEP if line else entry.rank

    def _start(self, tenant: str, among: Look) -> float:
        recent = min(self._leased, default=0.0)
        if tenant == NOBODY:
            return recent + BEHIND_TASKS * TASK_COST
        line = self._lines.get(tenant)
        if line is not None and line.order:
            return line.end
        start = min(self._before(tenant, among, limit=1), default=recent)
        return max(start, line.end) if line is not None else start

    def _first(self, tenant: str, start: float, fronts: Look) -> float:
        """The place of a tenant's task that would begin at `start` in its own queue."""
        line = self._lines.get(tenant)
        if tenant == NOBODY or (line is not None and line.order):
            return start
        first = min(self._before(tenant, fronts), default=start)
        return min(start, max(first, line.end) if line is not None else first)

    def _before(self, tenant: str, tasks: Look, *, limit: int | None = None) -> Iterable[float]:
        """Places before those who have more waiting; others have come for little, and stay ahead."""
        others = (self._entries.get(task.key) for task in tasks())
        return islice(
            (
                self._place(other) - BEFORE
                for other in others
                if other is not None and other.tenant not in (tenant, NOBODY) and self.waiting_of(other.tenant) > 1
            ),
            limit,
        )


def _rank(share: Share, place: float) -> float:
    return place - share.service_class * CLASS_STEP
