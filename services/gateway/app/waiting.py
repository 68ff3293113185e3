"""The waiting tasks of all open jobs, held ready for ordering, and a bell for the workers that wait for one."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence

from services.gateway.jobs.machine import PAUSE_MAX_S
from services.gateway.jobs.model import Annotation, Generation, Job, Task, TaskState
from services.gateway.ordering.backlog import Backlog
from services.gateway.ordering.tasks import Key, Kind, Waiting
from services.gateway.ports import Clock

# What the diffusion service takes where a request says nothing, and below what there is no guidance.
DEFAULT_GUIDANCE = 5.0
NO_GUIDANCE = 1.0


def kind_of(job: Job, task: Task) -> Kind:
    if isinstance(task.work, Annotation):
        return Kind(stage=task.stage, needs=frozenset({f"annotator:{task.work.annotator}"}))
    work = job.work
    assert isinstance(work, Generation)
    guidance = DEFAULT_GUIDANCE if work.guidance_scale is None else work.guidance_scale
    return Kind(
        stage=task.stage,
        needs=work.needs,
        checkpoint=work.model,
        width_px=work.width_px,
        height_px=work.height_px,
        guided=guidance > NO_GUIDANCE,
    )


def _waiting(job: Job, task: Task) -> Waiting:
    return Waiting(
        key=(job.id, task.number),
        kind=kind_of(job, task),
        priority=job.priority,
        create_time_s=job.create_time_s,
        queue_time_s=task.queue_time_s,
        alone=task.alone,
        failed_nodes=task.failed_nodes,
    )


class Bell:
    """Wakes those who wait for a stage's work."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def ring(self, stage: str) -> None:
        for waiter in self._waiting.pop(stage, ()):
            if not waiter.done():
                waiter.set_result(None)

    def ring_all(self) -> None:
        for stage in list(self._waiting):
            self.ring(stage)

    async def wait(self, stage: str, *, wait_s: float) -> None:
        """Return when the stage's bell rings, or after that time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(stage, set())
        waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=wait_s)
        finally:
            waiters.discard(waiter)


class WaitingTasks:
    def __init__(self, bell: Bell, clock: Clock) -> None:
        self.backlog = Backlog()
        self._bell = bell
        self._clock = clock
        # Tasks whose pause after a try that came to nothing is not over: until when, on the monotonic clock, and for
        # which of their pauses.
        self._pausing: dict[Key, tuple[float, float]] = {}
        # Tasks that somebody is about to lease: not in the backlog.
        self._held: set[Key] = set()
        # Open jobs to their queued tasks, and how many more are blocked.
        self._queued: dict[str, dict[int, Waiting]] = {}
        self._blocked: Counter[str] = Counter()
        self._count = 0

    @property
    def count(self) -> int:
        """Queued and blocked tasks."""
        return self._count

    def observe(self, job: Job) -> None:
        for task in job.tasks:
            self._observe_pause((job.id, task.number), task)
        before = self._queued.pop(job.id, {})
        now = {task.number: _waiting(job, task) for task in job.tasks if task.state is TaskState.QUEUED}
        self._count_job(job, len(before), len(now))
        for number in before.keys() - now.keys():
            self.backlog.remove((job.id, number))
        if now:
            self._queued[job.id] = now
        new = [task for number, task in now.items() if before.get(number) != task]
        self._offer(task for task in new if task.key not in self._held)

    def _count_job(self, job: Job, queued_before: int, queued_now: int) -> None:
        blocked = sum(task.state is TaskState.BLOCKED for task in job.tasks)
        self._count += queued_now - queued_before + blocked - self._blocked.pop(job.id, 0)
        if blocked:
            self._blocked[job.id] = blocked

    def _observe_pause(self, key: Key, task: Task) -> None:
        """A pause is reckoned once, and is never longer than any we make: wall clocks jump."""
        if task.state is not TaskState.QUEUED or not task.not_before_s:
            self._pausing.pop(key, None)
        elif self._pausing.get(key, (0.0, 0.0))[1] != task.not_before_s:
            pause_s = min(PAUSE_MAX_S, task.not_before_s - self._clock.now_s())
            self._pausing[key] = (self._clock.monotonic_s() + pause_s, task.not_before_s)

    def release_due(self) -> None:
        """Offer the tasks whose pause is over."""
        now_s = self._clock.monotonic_s()
        due = [key for key, (until_s, _) in self._pausing.items() if until_s <= now_s]
        ready = (self._queued.get(job_id, {}).get(number) for job_id, number in due)
        self._offer(task for task in ready if task is not None and task.key not in self._held)

    def _may_go(self, key: Key) -> bool:
        return self._pausing.get(key, (0.0, 0.0))[0] <= self._clock.monotonic_s()

    def _offer(self, tasks: Iterable[Waiting]) -> None:
        stages = set()
        for task in tasks:
            if not self._may_go(task.key) or task.key in self.backlog:
                continue
            self.backlog.add(task)
            stages.add(task.kind.stage)
        for stage in stages:
            self._bell.ring(stage)

    def hold(self, keys: Sequence[Key]) -> None:
        """Nobody else gets them until they are released."""
        for key in keys:
            self._held.add(key)
            self.backlog.remove(key)

    def release(self, keys: Sequence[Key]) -> None:
        """Those that still wait are offered again."""
        self._held.difference_update(keys)
        waiting = (self._queued.get(job_id, {}).get(number) for job_id, number in keys)
        self._offer(task for task in waiting if task is not None)
