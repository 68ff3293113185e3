"""What workers ask for: tasks leased, renewed and ended."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLine:
    """How much waits for one stage and checkpoint; the checkpoint is empty for stages without."""

    stage: str
    checkpoint: str
    waiting: int
    blocked: int
    leased: int
    # Of the waiting ones; 0 where none waits.
    oldest_age_s: float


class Queue:
    def statistics(self) -> Sequence[QueueLine]:
        raise NotImplementedError
