"""Retries of calls to the gateway, with exponential back-off, and what they depend on: clock, sleep and randomness.

`Env` is passed in, so that tests decide about time and randomness.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from fanlight.backoff import backoff_s
from fanlight.errors import FanlightError, LeaseLost
from services.kernel.errors_wire import from_rpc_error
from services.kernel.logs import get_logger

log = get_logger()

CALL_DEADLINE_S = 10.0

Result = TypeVar("Result")


def _new_id() -> str:
    return secrets.token_hex(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    # From 0 up to 1.
    random: Callable[[], float] = random.random
    new_id: Callable[[], str] = _new_id


async def race(work: Coroutine[Any, Any, Result], *interrupts: Coroutine[Any, Any, object]) -> Result | None:
    """The work's result, or None if an interrupt ends first. Whatever has not ended by then is cancelled."""
    working = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [working, *(asyncio.create_task(each) for each in interrupts)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def our_errors() -> Iterator[None]:
    """Inside, a gRPC error becomes the FanlightError that the gateway raised."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def is_retryable(error: FanlightError) -> bool:
    """Whether the same call may succeed later."""
    return not (error.is_final or isinstance(error, LeaseLost))


class Backoff:
    """The pauses of exponential back-off with jitter, up to `max_s` each."""

    def __init__(self, env: Env, *, max_s: float) -> None:
        self._env = env
        self._max_s = max_s
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def next_s(self, error: FanlightError | None = None) -> float:
        """The next pause; at least what the error asks for."""
        pause_s = backoff_s(self._failures, longest_s=self._max_s, chance=self._env.random())
        self._failures += 1
        return max((error.retry_after_s or 0.0) if error else 0.0, pause_s)


class Throttle:
    """Which log lines to write: a key that differs from the last one, and the same one seldom."""

    def __init__(self, env: Env, *, every_s: float) -> None:
        self._env = env
        self._every_s = every_s
        self.reset()

    def reset(self) -> None:
        self._key: str | None = None
        self._at_s = 0.0

    def allows(self, key: str) -> bool:
        now_s = self._env.now_s()
        if key == self._key and now_s - self._at_s < self._every_s:
            return False
        self._key, self._at_s = key, now_s
        return True


class RetryPolicy:
    """Retries a call until it succeeds, fails with a final error, or `limit_s` is over."""

    def __init__(self, env: Env, *, delay_max_s: float, limit_s: float) -> None:
        self._env = env
        self._delay_max_s = delay_max_s
        self._limit_s = limit_s

    async def call(self, attempt: Callable[[], Awaitable[Result]], *, doing: str) -> Result:
        """The attempt's result. Raises its last error. `doing` names it in the log."""
        backoff = Backoff(self._env, max_s=self._delay_max_s)
        end_s = self._env.now_s() + self._limit_s
        while True:
            try:
                return await attempt()
            except FanlightError as error:
                pause_s = backoff.next_s(error)
                if not is_retryable(error) or self._env.now_s() + pause_s > end_s:
                    raise
                log.info("call_retried", doing=doing, reason=error.reason, pause_s=round(pause_s, 2))
            await self._env.sleep(pause_s)
