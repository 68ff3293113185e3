"""The one queue before a stage: leased tasks and direct calls share its slots."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.kernel.errors import ResourceExhausted

RETRY_AFTER_S = 2.0


class Admission:
    """`slots` run at a time; at most `waiting_limit` direct calls wait for one, first come first served."""

    def __init__(self, *, slots: int, waiting_limit: int) -> None:
        assert slots > 0
        self.slots = slots
        self._free = slots
        self._waiting_limit = waiting_limit
        self._waiting: list[asyncio.Future[None]] = []
        self._freed = asyncio.Event()

    @property
    def free(self) -> int:
        return self._free

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it. ResourceExhausted when too many wait already."""
        await self._acquire()
        try:
            yield
        finally:
            self.release()

    async def _acquire(self) -> None:
        if self.try_acquire():
            return
        if len(self._waiting) >= self._waiting_limit:
            raise ResourceExhausted(
                f"{self._waiting_limit} calls are waiting already; try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            else:
                self._waiting.remove(turn)
            raise

    def try_acquire(self) -> bool:
        """Take a slot if one is free and nobody waits for it."""
        if self._free == 0 or self._waiting:
            return False
        self._free -= 1
        return True

    def release(self) -> None:
        """Give a slot back: to the first who waits, else to all."""
        if self._waiting:
            self._waiting.pop(0).set_result(None)
            return
        self._free += 1
        self._freed.set()

    async def wait_for_free(self) -> None:
        """Return once a slot is free; it may be gone again by then."""
        while self._free == 0:
            self._freed.clear()
            await self._freed.wait()
