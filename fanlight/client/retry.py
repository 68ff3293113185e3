"""When a call is sent again: time, back-off and jitter. Knows nothing of what is called."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from fanlight.client.status import to_error
from fanlight.errors import CallFailed

Answer = TypeVar("Answer")

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0


@dataclass(kw_only=True)
class Retry:
    """Sends calls again while that may help, never past their deadline.

    A gateway that has never answered is given up on after `connect_s`; one that has, such as one that restarts, is
    waited for until the deadline.
    """

    connect_s: float
    answered: bool = False
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random

    async def call(self, send: Callable[[float], Awaitable[Answer]], *, timeout_s: float) -> Answer:
        """`send` gets the seconds that are left. Raises CallFailed of the last try."""
        started_s = self.clock()
        tries = 0
        while True:
            try:
                answer = await send(max(started_s + timeout_s - self.clock(), 0.001))
            except grpc.RpcError as rpc_error:
                error = to_error(rpc_error)
            else:
                self.answered = True
                return answer
            delay_s = self.delay_s(error, tries)
            tries += 1
            patience_s = timeout_s if self.answered else min(timeout_s, self.connect_s)
            if delay_s is None or self.clock() + delay_s > started_s + patience_s:
                raise error
            await self.sleep(delay_s)

    def delay_s(self, error: CallFailed, tries: int) -> float | None:
        """How long to wait before sending again after so many tries; None where that would not help."""
        if error.code == "UNAVAILABLE":
            return error.retry_after_s or self.backoff_s(tries)
        self.answered = self.answered or error.code != "DEADLINE_EXCEEDED"
        if error.code == "RESOURCE_EXHAUSTED":
            return error.retry_after_s
        return None

    def backoff_s(self, tries: int) -> float:
        """Doubles from try to try; half of it is chance, so that clients do not come back all at once."""
        ceiling_s = min(FIRST_DELAY_S * 2.0 ** min(tries, 16), LONGEST_DELAY_S)
        return ceiling_s * (0.5 + 0.5 * self.jitter())
