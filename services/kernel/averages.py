"""The exponentially weighted moving average (EWMA) of measurements, and their deviation from it. Knows no unit.

Mean and variance as in T. Finch, Incremental calculation of weighted mean and variance, 2009, section 9.
"""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class MovingAverage:
    """`weight`: how much the latest value counts against all before it, above 0 to 1. The first value counts fully."""

    weight: float
    mean: float = 0.0
    variance: float = 0.0
    count: int = 0
    # Whether the first values all count the same, until there are enough for `weight`.
    warms_up: bool = False

    @property
    def deviation(self) -> float:
        """The standard deviation, in the unit of the values; 0 before the second one."""
        return math.sqrt(self.variance)

    def note(self, value: float) -> None:
        self.count += 1
        if self.count == 1:
            self.mean = value
            return
        weight = max(self.weight, 1 / self.count) if self.warms_up else self.weight
        difference = value - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)
