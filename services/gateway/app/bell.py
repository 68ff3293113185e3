"""Wakes workers whose polls wait."""

import asyncio


class Bell:
    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def ring(self, worker_id: str) -> None:
        for waiter in self._waiting.pop(worker_id, ()):
            if not waiter.done():
                waiter.set_result(None)

    def ring_all(self) -> None:
        for worker_id in list(self._waiting):
            self.ring(worker_id)

    async def wait(self, worker_id: str, *, wait_s: float) -> None:
        """Return when the worker's bell rings, or after that time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(worker_id, set())
        waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=wait_s)
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiting.get(worker_id) is waiters:
                del self._waiting[worker_id]
