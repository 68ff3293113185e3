"""A cache bounded by bytes, with eviction of the least recently used entry (LRU). For one thread; knows no clock."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteLru(Generic[Key, Value]):
    """What is larger than the whole cache is not kept. `count_limit`: how many entries at most; 0 for no such limit."""

    def __init__(self, *, limit_bytes: int, size_of: Callable[[Value], int], count_limit: int = 0) -> None:
        self._limit_bytes = limit_bytes
        self._count_limit = count_limit
        self._size_of = size_of
        # The least recently used first.
        self._entries: OrderedDict[Key, Value] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def get(self, key: Key, *, touch: bool = True) -> Value | None:
        """None for what is not cached. `touch`: it counts as a use."""
        value = self._entries.get(key)
        if value is not None and touch:
            self._entries.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        """In the place of what was there; evicts others until all fits."""
        self.drop(key)
        size_bytes = self._size_of(value)
        if size_bytes > self._limit_bytes:
            return
        self._entries[key] = value
        self.size_bytes += size_bytes
        while self.size_bytes > self._limit_bytes or (self._count_limit and len(self._entries) > self._count_limit):
            self.drop(next(iter(self._entries)))

    def drop(self, key: Key) -> None:
        """No error where it is not cached."""
        value = self._entries.pop(key, None)
        if value is not None:
            self.size_bytes -= self._size_of(value)

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0
