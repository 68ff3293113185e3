"""Turns at a loaded model: one caller at a time has it, and takes along those who wait with the same wish.

So pictures of one shape for one annotator go through a network together. Blocking; knows no network.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Sequence[Item]], Sequence[Result]]


@dataclass(eq=False, slots=True, kw_only=True)
class _Turn(Generic[Item, Result]):
    key: object
    item: Item
    result: list[Result] = field(default_factory=list)
    error: BaseException | None = None
    is_over: bool = False


class Lane(Generic[Item, Result]):
    def __init__(self, *, batch_limit: int) -> None:
        self._batch_limit = batch_limit
        self._changed = threading.Condition()
        self._waiting: list[_Turn[Item, Result]] = []
        self._is_busy = False

    def run(self, key: object, item: Item, work: Work[Item, Result]) -> Result:
        """What `work` gives for the item, perhaps worked on with others of an equal key. Raises what it raises."""
        turn: _Turn[Item, Result] = _Turn(key=key, item=item)
        batch = self._wait(turn)
        if batch:
            self._do(batch, work)
        if turn.error is not None:
            raise turn.error
        return turn.result[0]

    def _wait(self, turn: _Turn[Item, Result]) -> list[_Turn[Item, Result]]:
        """Those to work for, this one among them; none where somebody did it meanwhile."""
        with self._changed:
            self._waiting.append(turn)
            self._changed.wait_for(lambda: turn.is_over or not self._is_busy)
            if turn.is_over:
                return []
            self._is_busy = True
            alike = [other for other in self._waiting if other is not turn and other.key == turn.key]
            batch = [turn, *alike[: self._batch_limit - 1]]
            self._waiting = [other for other in self._waiting if other not in batch]
            return batch

    def _do(self, batch: list[_Turn[Item, Result]], work: Work[Item, Result]) -> None:
        try:
            _work(batch, work)
        finally:
            with self._changed:
                for turn in batch:
                    turn.is_over = True
                self._is_busy = False
                self._changed.notify_all()


def _work(batch: list[_Turn[Item, Result]], work: Work[Item, Result]) -> None:
    """A batch that fails is worked on one by one, so that nobody gets another's error."""
    try:
        results = work([turn.item for turn in batch])
        for turn, result in zip(batch, results, strict=True):
            turn.result.append(result)
    except BaseException as error:
        if len(batch) == 1:
            batch[0].error = error
            return
        for turn in batch:
            turn.result.clear()
            _work([turn], work)
