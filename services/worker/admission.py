"""The one queue before a stage: leased tasks and direct calls share its slots, first come first served."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fanlight.errors import ResourceExhausted

RETRY_AFTER_S = 2.0


class Slots:
    """Some slots that somebody holds. Releasing them again does nothing."""

    def __init__(self, admission: "Admission", count: int) -> None:
        self._admission = admission
        self._count = count

    def release(self) -> None:
        count, self._count = self._count, 0
        self._admission._give_back(count)


class Admission:
    """`slots` run at a time; at most `waiting_limit` direct calls wait for one.

    For one event loop, whose turns make every step atomic.
    """

    def __init__(self, *, slots: int, waiting_limit: int) -> None:
        assert slots > 0
        self.slots = slots
        self._free = slots
        self._waiting_limit = waiting_limit
        # Who waits, in order, and how many slots each needs. A cancelled one stays until its task runs again.
        self._turns: dict[asyncio.Future[None], int] = {}
        self._freed = asyncio.Event()
        self._freed.set()

    @property
    def free(self) -> int:
        """How many slots `take` would give now."""
        return 0 if self._turns else self._free

    @property
    def waiting(self) -> int:
        return len(self._turns)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it. ResourceExhausted when too many wait already."""
        if self.waiting >= self._waiting_limit and not self.free:
            raise ResourceExhausted(
                f"{self._waiting_limit} calls are waiting already; try again later", retry_after_s=RETRY_AFTER_S
            )
        held = await self._acquire(1)
        try:
            yield
        finally:
            held.release()

    @asynccontextmanager
    async def enter_alone(self) -> AsyncIterator[None]:
        """Wait for all slots and hold them. The caller must hold none, else it waits for itself."""
        held = await self._acquire(self.slots)
        try:
            yield
        finally:
            held.release()

    def take(self, at_most: int) -> list[Slots]:
        """The slots that are free now, one by one; none while somebody waits."""
        taken = [Slots(self, 1) for _ in range(min(self.free, at_most))]
        self._free -= len(taken)
        self._note()
        return taken

    async def wait_for_free(self) -> None:
        """Return once `take` would give a slot; it may be gone again by then."""
        while not self.free:
            await self._freed.wait()

    async def _acquire(self, count: int) -> Slots:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[turn] = count
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            self._leave(turn, count)
            raise
        return Slots(self, count)

    def _leave(self, turn: asyncio.Future[None], count: int) -> None:
        """Its turn may have come in the same moment; then the slots go on to the next."""
        self._turns.pop(turn, None)
        if not turn.cancelled():
            self._free += count
        self._serve()

    def _give_back(self, count: int) -> None:
        self._free += count
        assert self._free <= self.slots
        self._serve()

    def _serve(self) -> None:
        """Let those in front have their slots, as long as there are enough."""
        while self._turns:
            turn, count = next(iter(self._turns.items()))
            if not turn.done() and count > self._free:
                break
            del self._turns[turn]
            if not turn.done():
                self._free -= count
                turn.set_result(None)
        self._note()

    def _note(self) -> None:
        if self.free:
            self._freed.set()
        else:
            self._freed.clear()
