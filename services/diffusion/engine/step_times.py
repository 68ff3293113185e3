"""How long one evaluation of the model takes, by family and size. Pure: knows no clock."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

# How much the latest evaluation's time counts against those before.
LATEST_WEIGHT = 0.2
# Of so many families and sizes the times are kept, those that were measured last.
CLASSES_LIMIT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """`size_class`: as fanlight.contract has it; seconds, whatever the batch."""

    family: str
    size_class: int
    mean_s: float
    variance: float = 0.0

    @property
    def deviation_s(self) -> float:
        return math.sqrt(self.variance)


class StepTimes:
    """Exponentially weighted means. For one thread."""

    def __init__(self) -> None:
        # The one that was measured longest ago first.
        self._times: OrderedDict[tuple[str, int], StepTime] = OrderedDict()

    def __iter__(self) -> Iterator[StepTime]:
        return iter(sorted(self._times.values(), key=lambda time: (time.family, time.size_class)))

    def note(self, family: str, size_class: int, took_s: float) -> None:
        key = (family, size_class)
        before = self._times.pop(key, None)
        strayed_s = took_s - before.mean_s if before else 0.0
        mean_s, variance = (before.mean_s, before.variance) if before else (took_s, 0.0)
        self._times[key] = StepTime(
            family=family,
            size_class=size_class,
            mean_s=mean_s + LATEST_WEIGHT * strayed_s,
            variance=(1 - LATEST_WEIGHT) * (variance + LATEST_WEIGHT * strayed_s * strayed_s),
        )
        if len(self._times) > CLASSES_LIMIT:
            self._times.popitem(last=False)
