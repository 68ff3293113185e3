"""Whose turn on the device it is. Pure: no clock, no device, no await."""

import itertools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from services.diffusion.engine.keys import BatchKey

Item = TypeVar("Item")


class _Waiting(NamedTuple, Generic[Item]):
    number: int
    key: BatchKey
    item: Item


class Turns(Generic[Item]):
    """First come, first served, except that whoever fits the batch on the device joins it at once.

    A key that has held the device for `hold_limit_s` while another waits takes no more, so that it comes to an end.
    Nor does a batch that somebody had no room beside.
    """

    def __init__(self, *, rows_limit: int, hold_limit_s: float) -> None:
        self._rows_limit = rows_limit
        self._hold_limit_s = hold_limit_s
        # In the order in which they came.
        self._waiting: list[_Waiting[Item]] = []
        self._numbers = itertools.count()
        self._key: BatchKey | None = None
        self._since_s = 0.0
        self._taken: list[_Waiting[Item]] = []
        self._is_full = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: BatchKey, item: Item) -> None:
        self._waiting.append(_Waiting(next(self._numbers), key, item))

    def put_back(self, items: Sequence[Item]) -> None:
        """Those just taken found no room beside the batch: they wait for its end, where they stood before."""
        back = [each for each in self._taken if any(each.item is item for item in items)]
        self._waiting = sorted([*self._waiting, *back], key=lambda each: each.number)
        self._is_full = True

    def remove(self, item: Item) -> None:
        """No longer wanted; nothing where it does not wait."""
        self._waiting = [each for each in self._waiting if each.item is not item]

    def take(self, *, now_s: float, running: int) -> list[Item]:
        """Who joins the batch now, beside `running` rows; with none running the one who waited longest decides."""
        self._taken = []
        if not self._waiting:
            return []
        if not running:
            self._key, self._since_s, self._is_full = self._waiting[0].key, now_s, False
        elif self._is_full or self._is_overdue(now_s):
            return []
        self._taken = [each for each in self._waiting if each.key == self._key][: self._rows_limit - running]
        self._waiting = [each for each in self._waiting if not any(each is other for other in self._taken)]
        return [each.item for each in self._taken]

    def _is_overdue(self, now_s: float) -> bool:
        return now_s - self._since_s >= self._hold_limit_s and any(each.key != self._key for each in self._waiting)
