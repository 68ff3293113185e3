"""Which workers are set aside because they are slow or bad, against others of their class; they come back on trial."""

from collections.abc import Callable

from services.gateway.jobs.model import Ending, Job, Task, TaskState
from services.gateway.ordering.pace import Paces
from services.gateway.ports import Clock
from services.kernel.logs import get_logger

log = get_logger()

# How long one is set aside; then it is judged anew.
SET_ASIDE_S = 900.0
# No more than this part of those that were judged lately, so that no fleet is emptied by mistake.
SHARE_MAX = 0.2
TRIED_LIMIT = 100_000


class Standings:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._paces = Paces()
        # Worker id to why it is set aside, and until when on the monotonic clock.
        self._aside: dict[str, tuple[str, float]] = {}
        self._judged: set[str] = set()
        # Tasks of open jobs whose endings were taken in: how many attempts of each.
        self._taken: dict[str, dict[int, int]] = {}

    def observe(self, job: Job, device_of: Callable[[str], str]) -> None:
        before = self._taken.pop(job.id, {})
        now: dict[int, int] = {}
        for task in job.tasks:
            now[task.number] = len(task.attempts) + (task.state is TaskState.SUCCEEDED)
            if now[task.number] > before.get(task.number, 0):
                self._learn(job, task, device_of)
        if not job.state.ended and any(now.values()):
            self._taken[job.id] = now

    def _learn(self, job: Job, task: Task, device_of: Callable[[str], str]) -> None:
        """From the newest ending of the task."""
        if task.state is TaskState.SUCCEEDED and task.lease is not None:
            worker, alike = task.lease.worker, task.lease.batch_size
            took_s = (task.end_time_s - task.lease.time_s) / max(1, alike)
            self._paces.done(worker, device_of(worker), _work_of(job, task), took_s)
        elif task.attempts and task.attempts[-1].ending is Ending.FAILED:
            worker = task.attempts[-1].worker
            self._paces.failed(worker, device_of(worker))
        else:
            return
        self._judged.add(worker)
        self._judge(worker)

    def _judge(self, worker: str) -> None:
        why = self._paces.fault_of(worker)
        if not why or self.fault_of(worker) or len(self._aside) + 1 > max(1.0, SHARE_MAX * len(self._judged)):
            return
        if len(self._judged) > 1:
            self._aside[worker] = (why, self._clock.monotonic_s() + SET_ASIDE_S)
            log.warning("worker_set_aside", worker=worker, why=why, for_s=SET_ASIDE_S)

    def fault_of(self, worker: str) -> str:
        """Why it is set aside; empty where it is not."""
        why, until_s = self._aside.get(worker, ("", 0.0))
        if why and until_s <= self._clock.monotonic_s():
            del self._aside[worker]
            self._paces.forget(worker)
            return ""
        return why

    def forget(self, worker: str) -> None:
        self._paces.forget(worker)
        self._judged.discard(worker)
        self._aside.pop(worker, None)


def _work_of(job: Job, task: Task) -> object:
    """What makes tasks alike."""
    return task.stage, job.request_of(task).facts
