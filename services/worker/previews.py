"""When previews of running tasks are made: for a report that is about to be sent, in a small share of the time.

Knows no stage: what a preview shows, and on which thread it is made, is the stage's.
"""

import asyncio

from fanlight.errors import FanlightError
from services.kernel.logs import get_logger
from services.worker.leases import WorkerLease, WorkerLeases
from services.worker.ports import Preview
from services.worker.retry import Env, race

log = get_logger()

# How long a report waits for its previews; one that takes longer goes with a later report.
PREVIEW_WAIT_S = 0.5


class PreviewPace:
    """Whether a preview may be made now, so that they take a small share of one core's time. Pure.

    A heavy decoder on a CPU would otherwise take as long as the images themselves.
    """

    # What may be spent in the long run, and at once after a pause.
    SHARE = 1 / 25
    CREDIT_S = 0.5

    def __init__(self) -> None:
        self._credit_s = self.CREDIT_S
        self._since_s = 0.0

    def allows(self, now_s: float) -> bool:
        earned_s = max(0.0, now_s - self._since_s) * self.SHARE
        self._credit_s, self._since_s = min(self.CREDIT_S, self._credit_s + earned_s), now_s
        return self._credit_s > 0

    def spend(self, cpu_s: float) -> None:
        self._credit_s -= cpu_s


class PreviewMaker:
    """Makes the previews of a report when it is about to be sent, one at a time for each lease."""

    def __init__(self, leases: WorkerLeases, env: Env) -> None:
        self._leases = leases
        self._env = env
        self._pace = PreviewPace()

    async def make(self) -> None:
        """Make the newest due preview of each lease. Waits for them a little: a renewal must not be late for them."""
        for lease in self._leases:
            may_begin = lease.due_preview is not None and lease.making is None
            if may_begin and self._pace.allows(self._env.now_s()):
                due, lease.due_preview = lease.due_preview, None
                assert due is not None
                lease.making = asyncio.create_task(self._make(lease, due))
        making = [lease.making for lease in self._leases if lease.making is not None]
        if making:
            await race(asyncio.wait(making), self._env.sleep(PREVIEW_WAIT_S))

    async def _make(self, lease: WorkerLease, due: Preview) -> None:
        try:
            preview = await due()
            self._pace.spend(preview.cpu_s)
            if preview.data:
                self._leases.add_preview(lease, preview.data)
        except FanlightError as error:
            log.info("preview_not_made", task=lease.task.name, reason=error.reason)
        finally:
            lease.making = None
