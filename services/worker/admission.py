"""Admission control: leased tasks and direct calls share a stage's slots, first come, first served."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fanlight.errors import ResourceExhausted

RETRY_AFTER_S = 2.0


class Slots:
    """Slots that a caller holds. Releasing them twice does nothing."""

    def __init__(self, admission: "Admission", count: int) -> None:
        self._admission = admission
        self._count = count

    def release(self) -> None:
        count, self._count = self._count, 0
        self._admission._give_back(count)


class Admission:
    """`slots` run at a time; at most `waiting_limit` direct calls wait for one.

    For one event loop: no step is interrupted by another.
    """

    def __init__(self, *, slots: int, waiting_limit: int) -> None:
        assert slots > 0
        self.slots = slots
        self._free = slots
        self._waiting_limit = waiting_limit
        # The waiting callers, in order, and how many slots each needs. A cancelled one stays until its task runs again.
        self._waiters: dict[asyncio.Future[None], int] = {}
        self._freed = asyncio.Event()
        self._freed.set()

    @property
    def free(self) -> int:
        """How many slots `take` would return now."""
        return 0 if self._waiters else self._free

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it. ResourceExhausted if too many calls wait already."""
        if self.waiting >= self._waiting_limit and not self.free:
            raise ResourceExhausted(
                f"{self._waiting_limit} calls are waiting already; try again later", retry_after_s=RETRY_AFTER_S
            )
        slots = await self._acquire(1)
        try:
            yield
        finally:
            slots.release()

    @asynccontextmanager
    async def enter_alone(self) -> AsyncIterator[None]:
        """Wait for all slots and hold them. The caller must hold none, else it would wait for itself."""
        slots = await self._acquire(self.slots)
        try:
            yield
        finally:
            slots.release()

    def take(self, at_most: int) -> list[Slots]:
        """The slots that are free now, each separately; none while other callers wait."""
        taken = [Slots(self, 1) for _ in range(min(self.free, at_most))]
        self._free -= len(taken)
        self._note()
        return taken

    async def wait_for_free(self) -> None:
        """Return once a slot is free; by then it may be taken again."""
        while not self.free:
            await self._freed.wait()

    async def _acquire(self, count: int) -> Slots:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = count
        self._serve()
        try:
            await waiter
        except asyncio.CancelledError:
            self._leave(waiter, count)
            raise
        return Slots(self, count)

    def _leave(self, waiter: asyncio.Future[None], count: int) -> None:
        """Remove a cancelled caller. If it got its slots in the same moment, they go to the next one."""
        self._waiters.pop(waiter, None)
        if not waiter.cancelled():
            self._free += count
        self._serve()

    def _give_back(self, count: int) -> None:
        self._free += count
        assert self._free <= self.slots
        self._serve()

    def _serve(self) -> None:
        """Give slots to the first waiters, as long as there are enough."""
        while self._waiters:
            waiter, count = next(iter(self._waiters.items()))
            if not waiter.done() and count > self._free:
                break
            del self._waiters[waiter]
            if not waiter.done():
                self._free -= count
                waiter.set_result(None)
        self._note()

    def _note(self) -> None:
        if self.free:
            self._freed.set()
        else:
            self._freed.clear()
