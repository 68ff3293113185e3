"""Residency of models in a memory of limited bytes: LRU eviction, never of what is pinned. Loads no torch."""

import gc
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any
from weakref import WeakSet

from fanlight.errors import ResourceExhausted


class Residency(IntEnum):
    """How near the device a model is, the nearest last."""

    REMOTE = 0
    DISK = 1
    RAM = 2
    VRAM = 3


class Pin:
    """While it lives, what was taken under it is not evicted: whoever uses the things keeps it.

    `work_bytes`: what working with them needs beside them. `dtype`: torch's number type that they are wanted in; None
    takes the device's.
    """

    __slots__ = ("__weakref__", "dtype", "work_bytes")

    def __init__(self, work_bytes: int = 0, dtype: Any = None) -> None:
        self.work_bytes = work_bytes
        self.dtype = dtype


@dataclass(slots=True, kw_only=True, eq=False)
class _Cached:
    thing: Any
    size_bytes: int
    used: int
    pins: "WeakSet[Pin]" = field(default_factory=WeakSet)

    @property
    def is_idle(self) -> bool:
        return not self.pins


class Tier:
    """One memory: a byte-bounded LRU cache that evicts nothing pinned. For one thread; `keys` may be read from any."""

    def __init__(
        self, name: str, *, limit_bytes: int, on_evicted: Callable[[Hashable], None] = lambda key: None
    ) -> None:
        """`on_evicted` is called with each key that was evicted."""
        self.name = name
        self.limit_bytes = limit_bytes
        self._on_evicted = on_evicted
        self._cached: dict[Hashable, _Cached] = {}
        self._uses = itertools.count()
        self._working: WeakSet[Pin] = WeakSet()

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return tuple(self._cached)

    @property
    def used_bytes(self) -> int:
        return sum(cached.size_bytes for cached in tuple(self._cached.values()))

    def admit(self, pin: Pin) -> None:
        """Keep memory for the pin's work free from now on. ResourceExhausted where even an empty memory lacks it.

        Idle things are evicted until all admitted work fits at once. Where that is not enough, it is enough that the
        largest of it fits: a batch that runs out of memory is run in parts.
        """
        self._make_room(0, work_bytes=pin.work_bytes, what="an image of this size")
        self._working.add(pin)

    def get(self, key: Hashable, pin: Pin) -> Any:
        """None where it is not cached."""
        cached = self._cached.get(key)
        if cached is None:
            return None
        cached.used = next(self._uses)
        cached.pins.add(pin)
        return cached.thing

    def put(self, key: Hashable, thing: Any, size_bytes: int, pin: Pin) -> None:
        """ResourceExhausted where it does not fit beside what is pinned."""
        self.make_room(size_bytes, what="a model")
        self._cached[key] = _Cached(thing=thing, size_bytes=size_bytes, used=next(self._uses))
        self._cached[key].pins.add(pin)

    def make_room(self, size_bytes: int, *, what: str) -> None:
        """Evict the least recently used. ResourceExhausted, with nothing evicted, where that is not enough."""
        self._make_room(size_bytes, what=what)

    def release(self) -> None:
        """Evict all that is idle."""
        gc.collect()
        self._evict(self._idle_bytes())

    def _make_room(self, size_bytes: int, *, what: str, work_bytes: int = 0) -> None:
        works = [work_bytes, *(pin.work_bytes for pin in self._working)]
        lacking = self.used_bytes + size_bytes - self.limit_bytes
        if lacking + max(works) > self._idle_bytes():
            # An error's traceback may still hold pins.
            gc.collect()
        if lacking + max(works) > self._idle_bytes():
            in_use = self.used_bytes - self._idle_bytes()
            raise ResourceExhausted(
                f"{what} needs {size_bytes + work_bytes} bytes of {self.name}; {self.limit_bytes} are for models, of"
                f" which {in_use} are in use"
            )
        self._evict(lacking + sum(works))

    def _evict(self, lacking_bytes: int) -> None:
        """Of what is idle, the least recently used first."""
        idle = [(cached.used, key) for key, cached in self._cached.items() if cached.is_idle]
        for _, key in sorted(idle, key=lambda pair: pair[0]):
            if lacking_bytes <= 0:
                return
            lacking_bytes -= self._cached.pop(key).size_bytes
            self._on_evicted(key)

    def _idle_bytes(self) -> int:
        return sum(cached.size_bytes for cached in self._cached.values() if cached.is_idle)
