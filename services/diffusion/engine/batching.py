"""Which images share a batch, and whose turn it is on the device. Pure: no clock, no device, no await."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from services.diffusion.engine.generation import Generation

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """Images with equal keys may be generated in one batch; all other options are kept per image."""

    model: str
    width_px: int
    height_px: int
    controlnets: tuple[str, ...]
    is_guided: bool
    # Those that change the UNet.
    loras: tuple[tuple[str, float], ...] = ()
    # Set for an image that shares its batch with no other.
    alone: int | None = None


def batch_key(generation: Generation, *, number: int) -> BatchKey:
    """`number`: a different one for every image."""
    return BatchKey(
        model=generation.checkpoint.id,
        width_px=generation.width_px,
        height_px=generation.height_px,
        controlnets=tuple(control.controlnet.id for control in generation.controls),
        loras=tuple(sorted((use.entry.id, use.unet_weight) for use in generation.loras if use.unet_weight)),
        is_guided=generation.is_guided,
        alone=number if generation.alone or generation.strict else None,
    )


class _Waiting(NamedTuple, Generic[Item]):
    number: int
    key: BatchKey
    item: Item
    rows: int


class BatchQueue(Generic[Item]):
    """First come, first served, except that an item that fits the running batch joins it at once.

    A batch takes no more items, so that it ends, once its key has had the device for `hold_limit_s` while another
    key waits, or once an item found no memory beside it.
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

    def add(self, key: BatchKey, item: Item, *, rows: int = 1) -> None:
        """`rows`: how many it counts for in its batch; one that counts for more than all is a batch of its own."""
        self._waiting.append(_Waiting(next(self._numbers), key, item, rows))

    def put_back(self, items: Sequence[Item]) -> None:
        """Items just taken found no memory beside the batch: they wait for its end, at their old places."""
        back = [each for each in self._taken if any(each.item is item for item in items)]
        self._waiting = sorted([*self._waiting, *back], key=lambda each: each.number)
        self._is_full = True

    def remove(self, item: Item) -> None:
        """Does nothing where the item does not wait."""
        self._waiting = [each for each in self._waiting if each.item is not item]

    def take(self, *, now_s: float, running: int) -> list[Item]:
        """The items that join the batch of `running` rows now; for an empty batch the oldest item's key decides."""
        self._taken = []
        if not self._waiting:
            return []
        if not running:
            self._key, self._since_s, self._is_full = self._waiting[0].key, now_s, False
        elif self._is_full or self._is_overdue(now_s):
            return []
        self._taken = self._fitting(running)
        self._waiting = [each for each in self._waiting if not any(each is other for other in self._taken)]
        return [each.item for each in self._taken]

    def _fitting(self, running: int) -> list[_Waiting[Item]]:
        """The oldest of the batch's key, as many as there are rows left for; one waits for room before younger ones."""
        taken: list[_Waiting[Item]] = []
        for each in self._waiting:
            if each.key == self._key:
                if running and running + each.rows > self._rows_limit:
                    break
                running += each.rows
                taken.append(each)
        return taken

    def _is_overdue(self, now_s: float) -> bool:
        return now_s - self._since_s >= self._hold_limit_s and any(each.key != self._key for each in self._waiting)
