"""How fast bytes come in, measured from what is fetched anyway."""

import math

# Smaller ones measure the way there and back, not the link.
MEASURED_BYTES_MIN = 64 * 1024
# How much the latest measurement counts.
WEIGHT = 0.3


class Goodput:
    """An exponentially weighted mean in bits per second, and its variance; 0 until something was measured."""

    def __init__(self) -> None:
        self.bps = 0.0
        self._variance = 0.0

    @property
    def deviation_bps(self) -> float:
        return math.sqrt(self._variance)

    def note(self, size_bytes: int, duration_s: float) -> None:
        if size_bytes < MEASURED_BYTES_MIN or duration_s <= 0:
            return
        latest_bps = size_bytes * 8 / duration_s
        strayed = latest_bps - self.bps if self.bps else 0.0
        self._variance = (1 - WEIGHT) * (self._variance + WEIGHT * strayed * strayed)
        self.bps = latest_bps if not self.bps else self.bps + WEIGHT * strayed
