"""When a child that died is started again. Pure: is told how long it lived, tells how long to wait."""

LONGEST_DELAY_S = 30.0
# Who lived this long was healthy: the next death starts counting anew.
HEALTHY_S = 60.0


class Restarts:
    """1, 2, 4 ... 30 seconds."""

    def __init__(self) -> None:
        self.deaths = 0

    def delay_s(self, lived_s: float) -> float:
        """Counts a death; the pause before the next start."""
        if lived_s >= HEALTHY_S:
            self.deaths = 0
        delay_s = min(2.0**self.deaths, LONGEST_DELAY_S)
        # Enough to stay at the longest pause, however often it dies.
        self.deaths = min(self.deaths + 1, 16)
        return delay_s
