"""Asks for tasks while slots are free, starts what comes, and leaves in order. One poll at a time.

The slots that are offered are held. When a direct call wants one, the open poll is ended and they are let go; an answer
lost that way costs nothing, because the next poll follows at once and names every token that is held.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from fanlight.queue.v1 import queue_pb2
from services.kernel.errors import FanlightError
from services.kernel.logs import get_logger
from services.worker.admission import Admission, Slots
from services.worker.config import WorkerSettings
from services.worker.leases import Leases
from services.worker.patience import Backoff
from services.worker.poller import Poller
from services.worker.surroundings import Surroundings, unless
from services.worker.task_runner import TaskRunner

log = get_logger()

# After an answer without tasks that came long before the wait was over, so that no gateway can make a worker spin.
EARLY_PAUSE_S = 0.2
# For giving back what is left and saying goodbye.
LEAVE_DEADLINE_S = 5.0


class Leasing:
    def __init__(
        self,
        admission: Admission,
        leases: Leases,
        poller: Poller,
        runner: TaskRunner,
        settings: WorkerSettings,
        surroundings: Surroundings,
        stop: asyncio.Event,
    ) -> None:
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
                await self._until(self._admission.wait_for_free(), limit_s=self._settings.report_every_s)
            slots = self._admission.take(self._settings.batch_tasks)
            try:
                pause_s = await self._poll(group, slots)
            finally:
                for slot in slots:
                    slot.release()
            if pause_s:
                await self._until(limit_s=pause_s)

    async def _until(self, *events: Coroutine[Any, Any, object], limit_s: float) -> None:
        await unless(self._surroundings.pause(limit_s), *events, self._stop.wait())

    async def _poll(self, group: asyncio.TaskGroup, slots: list[Slots]) -> float:
        """Offer the slots and start what comes for them; how long to pause then. Slots in use leave the list."""
        start_s = self._surroundings.now_s()
        self._is_told = False
        try:
            tasks = await self._ask(len(slots))
        except FanlightError as error:
            pause_s = self._backoff.next_s(error)
            log.warning("poll_failed", reason=error.reason, error=error.message, pause_s=round(pause_s, 2))
            return pause_s
        if tasks is None:
            return 0.0
        self._is_told = True
        self._backoff.reset()
        self._start(group, tasks, slots)
        took_s = self._surroundings.now_s() - start_s
        is_early = len(slots) > 0 and not tasks and took_s < self._settings.poll_wait_s / 2
        return EARLY_PAUSE_S if is_early else 0.0

    async def _ask(self, count: int) -> Sequence[queue_pb2.LeasedTask] | None:
        """What the gateway gives; None when a direct call or the end came first. With no slots only a report."""
        if not count:
            return await unless(self._poller.poll(max_tasks=0, wait_s=0.0), self._stop.wait())
        poll = self._poller.poll(max_tasks=count, wait_s=self._settings.poll_wait_s)
        return await unless(poll, self._admission.wait_until_wanted(), self._stop.wait())

    def _start(self, group: asyncio.TaskGroup, tasks: Sequence[queue_pb2.LeasedTask], slots: list[Slots]) -> None:
        for task in tasks:
            if slots:
                self._start_one(group, task, slots.pop())
            else:
                group.create_task(self._runner.give_back(task))

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
