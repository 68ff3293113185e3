"""How fast workers really are, by what the gateway sees itself: against others of their class. Pure.

A worker's pace is the time that its tasks took, leased to completed, over what such tasks take its class; 1 is usual.
Means and variances are exponentially weighted and on a logarithmic scale.
"""

import math
from dataclasses import dataclass

# How much the latest task counts.
WEIGHT = 0.15
# A worker is judged after so many tasks, beside so many others of its class.
TASKS_MIN = 8
OTHERS_MIN = 2
# Slow is what takes more than so many times as long, surely: so many standard errors of the mean away.
SLOW_FACTOR = 2.5
ERRORS = 2.0
# Bad is what fails so much of what it is given.
FAILING = 0.6
# No more than this part of a class is set aside, so that a bad reference empties no fleet.
SET_ASIDE_SHARE = 0.2
# A worker does a step in no less than this part of the time that its class needs for it.
ABSURD_FACTOR = 8.0
RECORDS_LIMIT = 10_000


@dataclass(slots=True)
class Mean:
    """Exponentially weighted, with its variance."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def note(self, value: float) -> None:
        self.count += 1
        weight = max(WEIGHT, 1 / self.count)
        strayed = value - self.mean
        self.mean += weight * strayed
        self.variance = (1 - weight) * (self.variance + weight * strayed * strayed)

    @property
    def error(self) -> float:
        """Of the mean; the weights make old values worth nothing."""
        return math.sqrt(self.variance * max(WEIGHT / (2 - WEIGHT), 1 / max(1, self.count)))


class Paces:
    def __init__(self) -> None:
        # By class and kind of work: the logarithm of seconds a task takes.
        self._usual: dict[tuple[str, object], Mean] = {}
        # By worker: logarithm of its times over the usual ones, and how much fails.
        self._paces: dict[str, Mean] = {}
        self._failing: dict[str, Mean] = {}
        self._classes: dict[str, str] = {}

    def done(self, worker: str, device: str, work: object, took_s: float) -> None:
        """A task was completed. `work`: what makes tasks alike, such as a checkpoint, a size and a number of steps."""
        if took_s <= 0:
            return
        self._classes[worker] = device
        usual = self._usual.setdefault((device, work), Mean())
        taken = math.log(took_s)
        if usual.count:
            self._paces.setdefault(worker, Mean()).note(taken - usual.mean)
        usual.note(taken)
        self._failing.setdefault(worker, Mean()).note(0.0)
        self._bound()

    def failed(self, worker: str, device: str) -> None:
        """A task came to nothing by the worker's fault."""
        self._classes[worker] = device
        self._failing.setdefault(worker, Mean()).note(1.0)
        self._bound()

    def fault_of(self, worker: str) -> str:
        """Why the worker should be set aside, in a sentence; empty where it should not."""
        failing = self._failing.get(worker)
        if failing is not None and failing.count >= TASKS_MIN and failing.mean >= FAILING:
            return f"of its last tasks {failing.mean:.0%} failed by its own fault"
        pace = self._paces.get(worker)
        if pace is None or pace.count < TASKS_MIN:
            return ""
        others = self._others_of(worker)
        if len(others) < OTHERS_MIN:
            return ""
        usual = others[len(others) // 2]
        if pace.mean - ERRORS * pace.error <= usual + math.log(SLOW_FACTOR):
            return ""
        times = math.exp(pace.mean - usual)
        return f"its tasks take {times:.1f} times as long as those of {len(others)} others of its class"

    def _others_of(self, worker: str) -> list[float]:
        device = self._classes.get(worker)
        return sorted(
            pace.mean
            for other, pace in self._paces.items()
            if other != worker and pace.count >= TASKS_MIN and self._classes[other] == device
        )

    def forget(self, worker: str) -> None:
        for records in (self._paces, self._failing, self._classes):
            records.pop(worker, None)

    def _bound(self) -> None:
        while len(self._usual) > RECORDS_LIMIT:
            del self._usual[next(iter(self._usual))]
        while len(self._classes) > RECORDS_LIMIT:
            self.forget(next(iter(self._classes)))


def plausible(reported: float, usual: float) -> float:
    """What a worker says of its speed, as far as it can be believed: a few times off what is usual for its class."""
    if not reported or not usual:
        return reported or usual
    return min(max(reported, usual / ABSURD_FACTOR), usual * ABSURD_FACTOR)
