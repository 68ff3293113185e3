"""Asks for tasks while slots are free, starts what comes, and leaves in order. One poll at a time.

A poll offers the slots that are free and holds none: a direct call may take one while the poll is open. A task that
comes for a slot that is gone is given back at once, which counts as no failure. (To end the poll instead would lose a
task that is on its way, which counts as a lost lease.)
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from fanlight.errors import FanlightError
from fanlight.queue.v1 import queue_pb2
from services.kernel.logs import get_logger
from services.worker.admission import Admission, Slots
from services.worker.config import WorkerSettings
from services.worker.leases import Leases
from services.worker.patience import Backoff
from services.worker.poller import Poller
from services.worker.prefetcher import Prefetcher
from services.worker.surroundings import Surroundings, unless
from services.worker.task_runner import TaskRunner

log = get_logger()

# After an answer without tasks that came long before the wait was over, so that no gateway can make a worker spin.
EARLY_PAUSE_S = 0.2
# For giving back what is left.
LEAVE_DEADLINE_S = 5.0


class Leasing:
    def __init__(
        self,
        admission: Admission,
        leases: Leases,
        poller: Poller,
        runner: TaskRunner,
        settings: WorkerSettings,
        prefetcher: Prefetcher,
        surroundings: Surroundings,
        stop: asyncio.Event,
    ) -> None:
        self._prefetcher = prefetcher
        self._admission = admission
        self._leases = leases
        self._poller = poller
        self._runner = runner
        self._settings = settings
        self._surroundings = surroundings
        self._stop = stop
        self._backoff = Backoff(surroundings, max_s=settings.retry_delay_max_s)
        # The last answer arrived; else the gateway may believe that we hold more than we do.
        self._is_told = False

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Poll until told to stop; what comes runs in the group."""
        while not self._stop.is_set():
            if self._is_told:
                events = self._admission.wait_for_free(), self._prefetcher.came.wait()
                await self._until(*events, limit_s=self._settings.report_every_s)
            pause_s = await self._poll(group)
            if pause_s:
                await self._until(limit_s=pause_s)

    async def _until(self, *events: Coroutine[Any, Any, object], limit_s: float) -> None:
        await unless(self._surroundings.pause(limit_s), *events, self._stop.wait())

    async def _poll(self, group: asyncio.TaskGroup) -> float:
        """Offer the free slots, or report if there are none, and start what comes; how long to pause then."""
        start_s = self._surroundings.now_s()
        count = min(self._admission.free, self._settings.batch_tasks)
        wait_s = self._settings.poll_wait_s if count else 0.0
        self._is_told = False
        try:
            # A model that came may be what a task waits for. A task that crosses this goes back at once.
            polling = self._poller.poll(max_tasks=count, wait_s=wait_s)
            tasks = await unless(polling, self._prefetcher.came.wait(), self._stop.wait())
        except FanlightError as error:
            pause_s = self._backoff.next_s(error)
            log.warning("poll_failed", reason=error.reason, error=error.message, pause_s=round(pause_s, 2))
            return pause_s
        if tasks is None:
            return 0.0
        self._is_told = True
        self._backoff.reset()
        await self._start(group, tasks)
        is_early = not tasks and self._surroundings.now_s() - start_s < wait_s / 2
        return EARLY_PAUSE_S if is_early else 0.0

    async def _start(self, group: asyncio.TaskGroup, tasks: Sequence[queue_pb2.LeasedTask]) -> None:
        """Run as many as there are slots now; the others were given back when this returns."""
        slots = self._admission.take(len(tasks))
        for task, slot in zip(tasks, slots, strict=False):
            self._start_one(group, task, slot)
        await asyncio.gather(*(self._runner.give_back(task) for task in tasks[len(slots) :]))

    def _start_one(self, group: asyncio.TaskGroup, task: queue_pb2.LeasedTask, slot: Slots) -> None:
        lease = self._leases.add(task, now_s=self._surroundings.now_s())
        lease.runner = group.create_task(self._runner.run(lease, slot), name=task.name)

        def end(_: object) -> None:
            # Also for one that was cancelled before it began.
            slot.release()
            self._leases.remove(lease)

        lease.runner.add_done_callback(end)

    async def drain(self, *, grace_s: float) -> None:
        """Finish what runs within the grace, then stop the rest and give it back at once."""
        log.info("worker_draining", tasks=len(self._leases), grace_s=grace_s)
        await asyncio.gather(self._say_leaving(), self._finish(grace_s))
        left = list(self._leases)
        for lease in left:
            self._leases.remove(lease)
            lease.stop()
        try:
            async with asyncio.timeout(LEAVE_DEADLINE_S):
                await asyncio.gather(*(self._runner.give_back(lease.task) for lease in left))
        except TimeoutError:
            log.warning("tasks_not_returned", tasks=len(left))

    async def _finish(self, grace_s: float) -> None:
        runners = [lease.runner for lease in self._leases if lease.runner]
        if runners:
            await unless(asyncio.wait(runners), self._surroundings.pause(grace_s))

    async def _say_leaving(self) -> None:
        try:
            await self._poller.poll(max_tasks=0, wait_s=0.0, draining=True)
        except FanlightError as error:
            log.warning("leaving_not_told", reason=error.reason)
