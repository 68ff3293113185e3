"""Tensors kept for the next picture that wants the same: so many bytes, the least recently used out first."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """For one thread."""

    def __init__(self, *, limit_bytes: int, size_of: Callable[[Value], int]) -> None:
        self._limit_bytes = limit_bytes
        self._size_of = size_of
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The kept value, or what `make` makes; kept unless it is larger than the whole cache."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = make()
        size_bytes = self._size_of(value)
        if size_bytes <= self._limit_bytes:
            self._kept[key] = value
            self.size_bytes += size_bytes
            self._shrink()
        return value

    def clear(self) -> None:
        self._kept.clear()
        self.size_bytes = 0

    def _shrink(self) -> None:
        while self.size_bytes > self._limit_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.size_bytes -= self._size_of(dropped)
