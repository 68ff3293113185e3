"""A hang watch whose time passes only when the test says: no test waits for a limit."""

import asyncio
from typing import Any

from services.worker.device import HangLimits, HangWatch


class FakeHangWatch(HangWatch):
    """`waited_s`: what was waited for so far, by the clock that is not there."""

    def __init__(self, limits: HangLimits | None = None, *, is_patient: bool = True) -> None:
        super().__init__(limits, wait=self._pass)
        self.waited_s = 0.0
        # While patient, the work is waited for, however long it takes.
        self.is_patient = is_patient
        self.changed = asyncio.Event()

    def hurry(self) -> None:
        """From now on the limit passes at once for work that has not ended."""
        self.is_patient = False
        self.changed.set()

    async def _pass(self, working: "asyncio.Future[Any]", wait_s: float) -> None:
        if self.is_patient:
            changed = asyncio.ensure_future(self.changed.wait())
            await asyncio.wait([working, changed], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            return
        self.waited_s += wait_s
        await asyncio.sleep(0)
