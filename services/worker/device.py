"""The device that a stage works on: how a hung one is noticed, and that it is lost. Knows no stage and no device.

Work that runs far longer than such work takes has hung. Its thread cannot be killed, so the process ends, for its
supervisor to start it again.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from fanlight.errors import NodeFault
from services.kernel.config import ProcessEnd

Result = TypeVar("Result")
# Returns after so many seconds, or earlier if the work has ended.
Wait = Callable[["asyncio.Future[Any]", float], Awaitable[None]]

# A limit is waited for in so many parts: time in which the whole process stood still counts as one of them at most.
PARTS = 12


class DeviceLost(NodeFault, ProcessEnd):
    """The device failed or hangs, so that only a new process can use it, as a GPU's context after a bad access."""

    reason = "DEVICE_LOST"
    # EX_TEMPFAIL of sysexits.h: start it again.
    exit_code = 75


@dataclass(frozen=True, slots=True, kw_only=True)
class HangLimits:
    """After how long work has hung."""

    # Of work whose time was measured: so many times that, and never less than the floor.
    factor: float = 20.0
    floor_s: float = 60.0
    # Of work that was not measured yet, which may load, compile or import first.
    first_s: float = 600.0

    def limit_s(self, measured_s: float | None, *, items: int = 1) -> float:
        """`measured_s`: what the work usually takes, None where that is not known. `items`: how much of it there is."""
        if measured_s is None:
            return self.first_s * items
        return max(self.floor_s, self.factor * measured_s * items)


async def _wait(working: "asyncio.Future[Any]", wait_s: float) -> None:
    await asyncio.wait([working], timeout=wait_s)


class HangWatch:
    """Waits for work on a thread, but not for ever."""

    def __init__(self, limits: HangLimits | None = None, *, wait: Wait = _wait) -> None:
        self.limits = limits or HangLimits()
        self._wait = wait

    async def has_finished(
        self, working: "asyncio.Future[Any]", *, has_begun: Callable[[], bool], limit_s: float
    ) -> bool:
        """Wait for the work; False if it did not end `limit_s` after it began. Its wait for its turn does not count."""
        left = PARTS
        while not working.done() and left:
            await self._wait(working, limit_s / PARTS)
            left -= has_begun()
        return working.done()

    async def run(
        self,
        executor: Executor,
        work: Callable[[], Result],
        *,
        limit_s: float,
        lost: Callable[[], DeviceLost],
        on_cancel: Callable[[], None] = lambda: None,
    ) -> Result:
        """Run blocking work on a thread of the executor; raises `lost()` if it hangs.

        As `run_blocking`: on cancellation waits for the work, within the limit, and calls `on_cancel` first.
        """
        begun = threading.Event()

        def begin() -> Result:
            begun.set()
            return work()

        job = executor.submit(begin)
        working = asyncio.wrap_future(job)
        try:
            if await self.has_finished(working, has_begun=begun.is_set, limit_s=limit_s):
                return working.result()
        except asyncio.CancelledError:
            on_cancel()
            if job.cancel():
                raise
            if await self.has_finished(working, has_begun=begun.is_set, limit_s=limit_s):
                working.exception()  # marks it as retrieved, so that asyncio does not log it
                raise
        raise lost()


class DeviceState:
    """Whether this process can still use its device. For one event loop."""

    def __init__(self) -> None:
        self.error: DeviceLost | None = None
        self._is_lost = asyncio.Event()

    def lose(self, error: DeviceLost) -> None:
        """The device is lost for this process. The first error counts."""
        self.error = self.error or error
        self._is_lost.set()

    async def wait_lost(self) -> DeviceLost:
        await self._is_lost.wait()
        assert self.error is not None
        return self.error
