"""How fast workers are: seconds per evaluation, and stragglers, by what the gateway measures itself. Pure.

A worker's pace is the time that its tasks took, leased to completed, over what such tasks take its class; 1 is usual.
Means and variances are exponentially weighted and on a logarithmic scale.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from services.kernel.averages import MovingAverage

# One evaluation where nothing was measured: 512 x 512 pixels, which are of this size class, on a small card.
USUAL_STEP_S = 0.3
USUAL_SIZE_CLASS = 18
# How much the latest task counts.
WEIGHT = 0.15
# A worker is judged after this many tasks, beside this many others of its class.
TASKS_MIN = 8
OTHERS_MIN = 2
# A straggler takes more than this many times as long, by at least this many standard errors of the mean.
SLOW_FACTOR = 2.5
ERRORS = 2.0
# A bad worker fails this share of its tasks, while the usual worker of its class fails less than this part of that.
FAILING = 0.6
USUALLY_FAILING = 0.5
# A reported speed is believed up to this factor off what is usual for the worker's class.
ABSURD_FACTOR = 8.0
RECORDS_LIMIT = 10_000
# The gateway's own measurements count from so many on: the best of the latest, because tasks also load and fetch.
DELIVERED_MIN, DELIVERED_LATEST = 3, 8

# Seconds for one evaluation, by model family and size class.
StepTimes = Mapping[tuple[str, int], float]


def step_s(own: StepTimes, usual: StepTimes, family: str, size_class: int) -> float:
    """Seconds for one evaluation of a model; family empty or size class 0 where they are not known.

    `own` is what the worker measured: that class counts first, then the nearest class of the family. Then `usual`, the
    times that are usual on its device. For a family in neither, the worker's other families show how fast it is.
    """
    known = own.get((family, size_class))
    if known is None:
        known = _nearest(own, family, size_class)
    if known is None:
        known = usual.get((family, size_class))
    if known is None:
        known = _nearest(usual, family, size_class)
    if known is None:
        known = _nearest(own, "", size_class)
    return USUAL_STEP_S * _pixel_ratio(size_class or USUAL_SIZE_CLASS, USUAL_SIZE_CLASS) if known is None else known


def _nearest(times: StepTimes, family: str, size_class: int) -> float | None:
    """The mean of those in the nearest class, scaled by pixels; None if the family has no times.

    Attention grows faster than pixels, but a class or two away that matters little. An empty family means all families.
    Where the size is not known, the family's middle class counts as it is.
    """
    of_family = sorted((each, time_s) for (name, each), time_s in times.items() if not family or name == family)
    if not of_family:
        return None
    if not size_class:
        return of_family[len(of_family) // 2][1]
    distance = min(abs(each - size_class) for each, _ in of_family)
    found = [
        time_s * _pixel_ratio(size_class, each) for each, time_s in of_family if abs(each - size_class) == distance
    ]
    return sum(found) / len(found)


def _pixel_ratio(size_class: int, other: int) -> float:
    """How many times as many pixels; a class is a power of two of them."""
    factor: float = 2.0 ** (size_class - other)
    return factor


def plausible(reported: float, usual: float) -> float:
    """A speed that a worker reports, limited to ABSURD_FACTOR off what is usual for its class."""
    if not reported or not usual:
        return reported or usual
    return min(max(reported, usual / ABSURD_FACTOR), usual * ABSURD_FACTOR)


class Delivered:
    """The best of the latest values that the gateway measured of something that workers claim."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=DELIVERED_LATEST)

    def note(self, value: float) -> None:
        self._latest.append(value)

    @property
    def least(self) -> float:
        """0 while there are too few."""
        return min(self._latest) if len(self._latest) >= DELIVERED_MIN else 0.0

    @property
    def largest(self) -> float:
        """0 while there are too few."""
        return max(self._latest) if len(self._latest) >= DELIVERED_MIN else 0.0


def delivered_times(claimed: StepTimes, measured: StepTimes) -> StepTimes:
    """What a worker delivered counts; its other claims are off by as much as those that were measured, if that is
    slower. So whoever claims much and delivers little is soon believed nothing.
    """
    if not measured:
        return claimed
    off = max([1.0, *(measured[each] / claimed[each] for each in measured if claimed.get(each))])
    return {**{which: time_s * off for which, time_s in claimed.items()}, **measured}


@dataclass(slots=True)
class RecentMean(MovingAverage):
    """Of the latest values, with the standard error of the mean."""

    weight: float = WEIGHT
    warms_up: bool = True

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance * max(self.weight / (2 - self.weight), 1 / max(1, self.count)))


class SpeedStats:
    """Finds stragglers and workers that fail, by comparing each with others of its class: its stage and device."""

    def __init__(self) -> None:
        # By class and kind of work: the logarithm of seconds a task takes.
        self._usual: dict[tuple[object, object], RecentMean] = {}
        # By worker: logarithm of its times over the usual ones, and how much fails.
        self._paces: dict[str, RecentMean] = {}
        self._failing: dict[str, RecentMean] = {}
        self._classes: dict[str, object] = {}

    def done(self, worker: str, worker_class: object, work: object, took_s: float) -> None:
        """A task was completed; one that took no time says nothing about the pace.

        `work`: what makes tasks alike, such as a checkpoint, a size and a number of steps.
        """
        self._classes[worker] = worker_class
        self._failing.setdefault(worker, RecentMean()).note(0.0)
        self._evict()
        if took_s <= 0:
            return
        usual = self._usual.setdefault((worker_class, work), RecentMean())
        taken = math.log(took_s)
        if usual.count:
            self._paces.setdefault(worker, RecentMean()).note(taken - usual.mean)
        usual.note(taken)

    def failed(self, worker: str, worker_class: object) -> None:
        """A task failed by the worker's fault."""
        self._classes[worker] = worker_class
        self._failing.setdefault(worker, RecentMean()).note(1.0)
        self._evict()

    def fault_of(self, worker: str) -> str:
        """Why the worker should be set aside, in a sentence; empty where it should not."""
        return self._failing_of(worker) or self._slow_of(worker)

    def _failing_of(self, worker: str) -> str:
        failing = self._failing.get(worker)
        if failing is None or failing.count < TASKS_MIN or failing.mean < FAILING:
            return ""
        others = self._alike(worker, self._failing, tasks_min=1)
        usual = others[len(others) // 2] if others else 1.0
        if usual > USUALLY_FAILING * failing.mean:
            return ""
        return f"of its last tasks {failing.mean:.0%} failed by its own fault, of others of its class {usual:.0%}"

    def _slow_of(self, worker: str) -> str:
        pace = self._paces.get(worker)
        if pace is None or pace.count < TASKS_MIN:
            return ""
        others = self._alike(worker, self._paces, tasks_min=TASKS_MIN)
        if len(others) < OTHERS_MIN:
            return ""
        usual = others[len(others) // 2]
        if pace.mean - ERRORS * pace.standard_error <= usual + math.log(SLOW_FACTOR):
            return ""
        times = math.exp(pace.mean - usual)
        return f"its tasks take {times:.1f} times as long as those of {len(others)} others of its class"

    def _alike(self, worker: str, records: Mapping[str, RecentMean], *, tasks_min: int) -> list[float]:
        """The means of the others of its class, in order."""
        worker_class = self._classes.get(worker)
        return sorted(
            each.mean
            for other, each in records.items()
            if other != worker and each.count >= tasks_min and self._classes[other] == worker_class
        )

    def forget(self, worker: str) -> None:
        for records in (self._paces, self._failing, self._classes):
            records.pop(worker, None)

    def _evict(self) -> None:
        while len(self._usual) > RECORDS_LIMIT:
            del self._usual[next(iter(self._usual))]
        while len(self._classes) > RECORDS_LIMIT:
            self.forget(next(iter(self._classes)))
