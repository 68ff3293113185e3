"""Whether the wall clock has jumped lately: what is thrown away by age waits until one can trust it again."""

from services.gateway.ports import Clock
from services.kernel.logs import get_logger

log = get_logger()

# Drift and leap seconds are less, in the time between two looks.
JUMP_S = 60.0
# A clock that was set wrong is often set right soon.
DISTRUST_S = 3_600.0


class ClockWatch:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._apart_s = self._apart()
        self._jumped_s: float | None = None

    def _apart(self) -> float:
        return self._clock.now_s() - self._clock.monotonic_s()

    def is_settled(self) -> bool:
        """Look from time to time."""
        apart_s, now_s = self._apart(), self._clock.monotonic_s()
        if abs(apart_s - self._apart_s) > JUMP_S:
            log.warning("clock_jumped", by_s=round(apart_s - self._apart_s))
            self._jumped_s = now_s
        self._apart_s = apart_s
        return self._jumped_s is None or now_s - self._jumped_s > DISTRUST_S
