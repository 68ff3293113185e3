"""How often, and how long, a call to the gateway is tried again."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fanlight.errors import FanlightError, LeaseLost
from services.kernel.logs import get_logger
from services.worker.surroundings import Surroundings

log = get_logger()

FIRST_DELAY_S = 0.2
DOUBLINGS_MAX = 16

Result = TypeVar("Result")


def may_pass(error: FanlightError) -> bool:
    """Whether the same call may succeed later."""
    return not (error.is_final or isinstance(error, LeaseLost))


class Backoff:
    """Pauses that double up to `max_s`, each shortened by chance to between half and all of it."""

    def __init__(self, surroundings: Surroundings, *, max_s: float) -> None:
        self._surroundings = surroundings
        self._max_s = max_s
        self._tries = 0

    def reset(self) -> None:
        self._tries = 0

    def next_s(self, error: FanlightError | None = None) -> float:
        """The next pause; at least what the error asks for."""
        whole_s: float = min(self._max_s, FIRST_DELAY_S * 2 ** min(self._tries, DOUBLINGS_MAX))
        self._tries += 1
        asked_s = (error.retry_after_s or 0.0) if error else 0.0
        return max(asked_s, whole_s * (0.5 + self._surroundings.random() / 2))


class Patience:
    """Tries a call again until it succeeds, fails for good, or `limit_s` is over."""

    def __init__(self, surroundings: Surroundings, *, delay_max_s: float, limit_s: float) -> None:
        self._surroundings = surroundings
        self._delay_max_s = delay_max_s
        self._limit_s = limit_s

    async def insist(self, attempt: Callable[[], Awaitable[Result]], *, doing: str) -> Result:
        """The attempt's result. Raises its last error."""
        backoff = Backoff(self._surroundings, max_s=self._delay_max_s)
        end_s = self._surroundings.now_s() + self._limit_s
        while True:
            try:
                return await attempt()
            except FanlightError as error:
                pause_s = backoff.next_s(error)
                if not may_pass(error) or self._surroundings.now_s() + pause_s > end_s:
                    raise
                log.info("trying_again", doing=doing, reason=error.reason, pause_s=round(pause_s, 2))
            await self._surroundings.pause(pause_s)
