"""The waiting tasks of all open jobs, told to the plan as they come and go; rings for the workers it has news for."""

from collections import Counter
from collections.abc import Iterable, Sequence

from services.gateway.app.bell import Bell
from services.gateway.app.kinds import kind_of, steps_of
from services.gateway.jobs.machine import PAUSE_MAX_S
from services.gateway.jobs.model import Ending, Job, Task, TaskState
from services.gateway.ordering.board import Board
from services.gateway.ordering.shares import Shares
from services.gateway.ordering.tasks import Key, Waiting
from services.gateway.ports import Clock

# What a task is reckoned to take where no worker has said.
USUAL_TASK_S = 5.0


class WaitingTasks:
    def __init__(self, board: Board, bell: Bell, clock: Clock) -> None:
        self._board = board
        self._bell = bell
        self._clock = clock
        self._shares = Shares()
        # Tasks whose pause after a try that came to nothing is not over: until when, on the monotonic clock, and for
        # which of their pauses.
        self._pausing: dict[Key, tuple[float, float]] = {}
        # Tasks that somebody is about to lease: not in the plan.
        self._held: set[Key] = set()
        # Of open jobs: their ranks, their queued and their leased tasks, and how many more are blocked.
        self._ranks: dict[str, float] = {}
        self._queued: dict[str, dict[int, Waiting]] = {}
        self._leased: dict[str, dict[int, str]] = {}
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
        now = self._waiting(job, before)
        self._count_job(job, len(before), len(now))
        for number in before.keys() - now.keys():
            self._board.remove((job.id, number))
        if now:
            self._queued[job.id] = now
        self._observe_leases(job)
        if job.state.ended:
            self._ranks.pop(job.id, None)
        new = [task for number, task in now.items() if before.get(number) != task]
        self._offer(task for task in new if task.key not in self._held)

    def _waiting(self, job: Job, before: dict[int, Waiting]) -> dict[int, Waiting]:
        return {
            task.number: self.as_waiting(job, task, before.get(task.number))
            for task in job.tasks
            if task.state is TaskState.QUEUED
        }

    def as_waiting(self, job: Job, task: Task, before: Waiting | None = None) -> Waiting:
        return Waiting(
            key=(job.id, task.number),
            kind=before.kind if before else kind_of(job, task),
            rank_s=self._rank_s(job),
            queue_time_s=before.queue_time_s if before else self._clock.monotonic_s(),
            steps=steps_of(job, task),
            alone=task.alone,
            failed_nodes=task.failed_nodes,
            tenant=job.tenant,
        )

    def _rank_s(self, job: Job) -> float:
        """Given once, when the job is first heard of."""
        if job.id not in self._ranks:
            self._ranks[job.id] = self._shares.rank_s(
                job.tenant,
                create_time_s=job.create_time_s,
                priority=job.priority,
                work_s=USUAL_TASK_S * len(job.tasks),
                slots=self._board.slots,
            )
        return self._ranks[job.id]

    def _observe_leases(self, job: Job) -> None:
        before = self._leased.pop(job.id, {})
        leases = {t.number: t.lease.worker for t in job.tasks if t.state is TaskState.LEASED and t.lease is not None}
        now_s = self._clock.monotonic_s()
        for number in [number for number, worker in before.items() if leases.get(number) != worker]:
            self._board.ended((job.id, number), now_s, heard=_was_told(job.tasks[number - 1]))
        for number in [number for number, worker in leases.items() if before.get(number) != worker]:
            self._board.started(leases[number], self.as_waiting(job, job.tasks[number - 1]), now_s)
        if leases:
            self._leased[job.id] = leases

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
        ready = (self.find(key) for key in due)
        self._offer(task for task in ready if task is not None and task.key not in self._held)

    def pause_s(self, key: Key) -> float:
        """How long the task is not offered yet."""
        return max(0.0, self._pausing.get(key, (0.0, 0.0))[0] - self._clock.monotonic_s())

    def find(self, key: Key) -> Waiting | None:
        """A queued task, offered or not."""
        return self._queued.get(key[0], {}).get(key[1])

    def _offer(self, tasks: Iterable[Waiting]) -> None:
        now_s = self._clock.monotonic_s()
        for task in tasks:
            if not self.pause_s(task.key) and self._board.lines.get(task.key) != task:
                self._board.add(task, now_s)
        self.ring()

    def ring(self) -> None:
        """Wake the workers that the plan has news for."""
        for worker_id in self._board.take_stirred():
            self._bell.ring(worker_id)

    def hold(self, keys: Sequence[Key]) -> None:
        """Nobody else gets them until they are released."""
        for key in keys:
            self._held.add(key)
            self._board.remove(key)

    def release(self, keys: Sequence[Key]) -> None:
        """Those that still wait are offered again."""
        self._held.difference_update(keys)
        waiting = (self.find(key) for key in keys)
        self._offer(task for task in waiting if task is not None)


def _was_told(task: Task) -> bool:
    """Its worker said how it ended; not so where a lease was lost."""
    return task.state is TaskState.SUCCEEDED or bool(task.attempts and task.attempts[-1].ending is Ending.FAILED)
