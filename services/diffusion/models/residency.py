"""Which things stay in a memory of so many bytes: the least recently used go first, never one in use. No torch."""

import gc
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from fanlight.errors import ResourceExhausted


class Lease:
    """While it lives, what was taken under it stays. Whoever needs the things keeps it.

    `work_bytes`: what working with them needs beside them.
    """

    __slots__ = ("__weakref__", "work_bytes")

    def __init__(self, work_bytes: int = 0) -> None:
        self.work_bytes = work_bytes


@dataclass(slots=True, kw_only=True, eq=False)
class _Held:
    thing: Any
    size_bytes: int
    used: int
    leases: "WeakSet[Lease]" = field(default_factory=WeakSet)


class Tier:
    """One memory. For one thread; `keys` may be read from any."""

    def __init__(
        self, name: str, *, limit_bytes: int, on_evicted: Callable[[Hashable], None] = lambda key: None
    ) -> None:
        """`on_evicted` is told each key that went."""
        self.name = name
        self.limit_bytes = limit_bytes
        self._on_evicted = on_evicted
        self._held: dict[Hashable, _Held] = {}
        self._uses = itertools.count()
        self._working: WeakSet[Lease] = WeakSet()

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(self._held)

    @property
    def used_bytes(self) -> int:
        return sum(held.size_bytes for held in tuple(self._held.values()))

    def admit(self, lease: Lease) -> None:
        """Keep its work's room free from now on. ResourceExhausted where not even an empty memory has it.

        What is not in use goes until all at work have room. Where that is not enough, room for the largest of them
        is: a batch that finds too little is run in parts.
        """
        self._make_room(0, work_bytes=lease.work_bytes, what="a picture of this size")
        self._working.add(lease)

    def get(self, key: Hashable, lease: Lease) -> Any:
        """None where it is not held."""
        held = self._held.get(key)
        if held is None:
            return None
        held.used = next(self._uses)
        held.leases.add(lease)
        return held.thing

    def put(self, key: Hashable, thing: Any, size_bytes: int, lease: Lease) -> None:
        """ResourceExhausted where it does not fit beside what is in use."""
        self.make_room(size_bytes, what="a model")
        self._held[key] = _Held(thing=thing, size_bytes=size_bytes, used=next(self._uses))
        self._held[key].leases.add(lease)

    def make_room(self, size_bytes: int, *, what: str) -> None:
        """Drops what was not used for longest. ResourceExhausted, with nothing dropped, where that is not enough."""
        self._make_room(size_bytes, what=what)

    def release(self) -> None:
        """Drops all that is not in use."""
        gc.collect()
        self._evict(self._idle_bytes())

    def _make_room(self, size_bytes: int, *, what: str, work_bytes: int = 0) -> None:
        works = [work_bytes, *(lease.work_bytes for lease in self._working)]
        lacking = self.used_bytes + size_bytes - self.limit_bytes
        if lacking + max(works) > self._idle_bytes():
            # An error's traceback may still hold what it was about.
            gc.collect()
        if lacking + max(works) > self._idle_bytes():
            in_use = self.used_bytes - self._idle_bytes()
            raise ResourceExhausted(
                f"{what} needs {size_bytes + work_bytes} bytes of {self.name}; {self.limit_bytes} are for models, of"
                f" which {in_use} are in use"
            )
        self._evict(lacking + sum(works))

    def _evict(self, lacking: int) -> None:
        """Of what is not in use, the least recently used first."""
        idle = [(held.used, key) for key, held in self._held.items() if not held.leases]
        for _, key in sorted(idle, key=lambda pair: pair[0]):
            if lacking <= 0:
                return
            lacking -= self._held.pop(key).size_bytes
            self._on_evicted(key)

    def _idle_bytes(self) -> int:
        return sum(held.size_bytes for held in self._held.values() if not held.leases)
