"""Whose turn on the device it is. Pure: no clock, no device, no await."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from services.diffusion.engine.keys import BatchKey

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """First come, first served, except that whoever fits the batch on the device joins it at once.

    A key that has held the device for `hold_limit_s` while another waits takes no more, so that it comes to an end.
    Nor does a batch that somebody had no room beside.
    """

    def __init__(self, *, rows_limit: int, hold_limit_s: float) -> None:
        self._rows_limit = rows_limit
        self._hold_limit_s = hold_limit_s
        self._waiting: list[tuple[BatchKey, Item]] = []
        self._key: BatchKey | None = None
        self._since_s = 0.0
        self._is_full = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: BatchKey, item: Item) -> None:
        self._waiting.append((key, item))

    def put_back(self, items: Sequence[Item]) -> None:
        """Those just taken found no room beside the batch: they wait for its end, before all others."""
        assert self._key is not None
        self._waiting[:0] = [(self._key, item) for item in items]
        self._is_full = True

    def remove(self, item: Item) -> None:
        """No longer wanted; nothing where it does not wait."""
        self._waiting = [each for each in self._waiting if each[1] is not item]

    def take(self, *, now_s: float, running: int) -> list[Item]:
        """Who joins the batch now, beside `running` rows; with none running the one who waited longest decides."""
        if not self._waiting:
            return []
        if not running:
            self._key, self._since_s, self._is_full = self._waiting[0][0], now_s, False
        elif self._is_full or self._is_overdue(now_s):
            return []
        taken = [each for each in self._waiting if each[0] == self._key][: self._rows_limit - running]
        self._waiting = [each for each in self._waiting if not any(each is other for other in taken)]
        return [item for _, item in taken]

    def _is_overdue(self, now_s: float) -> bool:
        return now_s - self._since_s >= self._hold_limit_s and any(key != self._key for key, _ in self._waiting)
