"""The open jobs' tasks in memory: which wait and back off, which deadlines pass, and whose polls to wake.

Feeds the scheduler as tasks come and go. What is given to whom is for the scheduler to decide.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from fanlight.contract.limits import size_class
from services.gateway.app.source_backoffs import SourceBackoffs
from services.gateway.domain.job import Ending, Job, Task, TaskState
from services.gateway.domain.machine import BACKOFF_MAX_S
from services.gateway.ports import Clock
from services.gateway.scheduler.queue import Key, TaskKind, WaitingTask, queue_of
from services.gateway.scheduler.schedule import Scheduler
from services.gateway.scheduler.shares import NOBODY, Share, Shares, equal_share

# How many of a queue's first tasks are looked at for tenants with much to do.
LOOK_AMONG = 32
# Of how many other queues, and how many of each.
LOOK_FRONTS, LOOK_FRONT = 16, 4
# How many tasks get another rank a second; the first ones first.
RERANK_LIMIT = 1_000
# Of how many kinds of tasks that wait for a source it is looked, each second, whether they still do.
LOOK_KINDS = 256


def kind_of(job: Job, task: Task) -> TaskKind:
    """The task as the scheduler sees it: what it needs, and how large its images are."""
    facts = job.request_of(task).facts
    return TaskKind(
        stage=task.stage,
        needs=facts.needs,
        amounts=facts.amounts,
        checkpoint=facts.checkpoint,
        family=facts.family,
        models=facts.models,
        parts=facts.parts,
        loras=facts.loras,
        width_px=facts.width_px,
        height_px=facts.height_px,
        size_class=size_class(facts.width_px, facts.height_px),
        guided=facts.guided,
    )


def steps_of(job: Job, task: Task) -> int:
    return job.request_of(task).facts.steps


class Notifier:
    """Wakes the long polls of workers."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}

    def notify(self, worker_id: str) -> None:
        for waiter in self._waiting.pop(worker_id, ()):
            if not waiter.done():
                waiter.set_result(None)

    def notify_all(self) -> None:
        for worker_id in list(self._waiting):
            self.notify(worker_id)

    async def wait(self, worker_id: str, *, wait_s: float) -> None:
        """Return when the worker is notified, or after that time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(worker_id, set())
        waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=wait_s)
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiting.get(worker_id) is waiters:
                del self._waiting[worker_id]


class Deadlines:
    """When open jobs must have ended, on this gateway's monotonic clock: a wall clock that jumps ends no job."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Job id to monotonic seconds, and the deadline that they were computed from.
        self._due: dict[str, tuple[float, float]] = {}

    def observe(self, job: Job) -> None:
        if job.state.ended or not job.deadline_s:
            self._due.pop(job.id, None)
        elif self._due.get(job.id, (0.0, 0.0))[1] != job.deadline_s:
            left_s = job.deadline_s - self._clock.now_s()
            self._due[job.id] = (self._clock.monotonic_s() + left_s, job.deadline_s)

    def passed(self) -> list[str]:
        """Ids of open jobs whose deadline has passed."""
        now_s = self._clock.monotonic_s()
        return [job_id for job_id, (due_s, _) in self._due.items() if due_s <= now_s]


class QueueIndex:
    """The waiting and leased tasks of all open jobs. Notifies the workers for which the scheduler has something new."""

    def __init__(
        self,
        scheduler: Scheduler,
        notifier: Notifier,
        sources: SourceBackoffs,
        clock: Clock,
        share_of: Callable[[str], Share] = equal_share,
    ) -> None:
        """`share_of`: what a tenant was granted."""
        self._scheduler = scheduler
        self._notifier = notifier
        self._sources = sources
        self._clock = clock
        self._shares = Shares(share_of)
        # Tasks in back-off after a failed or lost attempt: until when, in monotonic seconds, and their `not_before_s`.
        self._backoffs: dict[Key, tuple[float, float]] = {}
        # Queued tasks that wait for a source of weights, by kind.
        self._waiting_for_source: dict[TaskKind, set[Key]] = {}
        # Tasks that are being leased just now: withheld from the scheduler.
        self._withheld: set[Key] = set()
        # Of open jobs: their queued and their leased tasks, and how many more are blocked.
        self._queued: dict[str, dict[int, WaitingTask]] = {}
        self._leased: dict[str, dict[int, str]] = {}
        self._blocked: Counter[str] = Counter()
        self._count = 0
        # Queued and blocked tasks by tenant, without checks of results.
        self._counts: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Queued and blocked tasks."""
        return self._count

    def count_of(self, tenant: str) -> int:
        return self._counts[tenant]

    def grant(self, tenant: str, share: Share) -> None:
        """The operator changed what the tenant gets."""
        self._shares.grant(tenant, share)

    def observe(self, job: Job) -> None:
        for task in job.tasks:
            self._observe_backoff((job.id, task.number), task)
        before = self._queued.pop(job.id, {})
        now = self._waiting(job, before)
        self._count_job(job, len(before), len(now))
        for number in before.keys() - now.keys():
            self._scheduler.remove((job.id, number))
            if not job.tasks[number - 1].state.ended:
                self._shares.leave((job.id, number))
            self._wait_no_more(before[number])
        if now:
            self._queued[job.id] = now
        self._observe_leases(job)
        for task in job.tasks:
            if task.state.ended:
                self._shares.forget((job.id, task.number))
        new = [task for number, task in now.items() if before.get(number) != task]
        self._offer(task for task in new if task.key not in self._withheld)

    def _waiting(self, job: Job, before: dict[int, WaitingTask]) -> dict[int, WaitingTask]:
        return {
            task.number: self.as_waiting(job, task, before.get(task.number))
            for task in job.tasks
            if task.state is TaskState.QUEUED
        }

    def as_waiting(self, job: Job, task: Task, before: WaitingTask | None = None) -> WaitingTask:
        kind = before.kind if before else kind_of(job, task)
        return WaitingTask(
            key=(job.id, task.number),
            kind=kind,
            rank_s=self._rank_s(job, task, kind),
            queue_time_s=before.queue_time_s if before else self._clock.monotonic_s(),
            steps=steps_of(job, task),
            alone=task.alone,
            failed_nodes=task.failed_nodes,
            tenant=job.tenant,
        )

    def _rank_s(self, job: Job, task: Task, kind: TaskKind) -> float:
        key = (job.id, task.number)
        # A check is no tenant's wish, and takes nothing of its share.
        tenant = NOBODY if job.check is not None else job.tenant

        def among() -> Sequence[WaitingTask]:
            return self._scheduler.queues.first(queue_of(kind), LOOK_AMONG)

        def fronts() -> Sequence[WaitingTask]:
            return self._scheduler.queues.fronts(kind.stage, LOOK_FRONTS, LOOK_FRONT)

        if task.state is TaskState.QUEUED:
            return self._shares.enter(
                key, tenant, create_time_s=job.create_time_s, priority=job.priority, among=among, fronts=fronts
            )
        return self._shares.rank_of(key) if key in self._shares else self._shares.would_enter(tenant, among, fronts)

    def rerank(self) -> None:
        """Give some tasks whose tenant's order has changed their new rank."""
        for job_id, number in self._shares.pop_moved(RERANK_LIMIT):
            task = self._queued.get(job_id, {}).get(number)
            if task is not None:
                task = replace(task, rank_s=self._shares.rank_of(task.key))
                self._queued[job_id][number] = task
                self._scheduler.rerank(task)

    def _observe_leases(self, job: Job) -> None:
        before = self._leased.pop(job.id, {})
        leases = {t.number: t.lease.worker for t in job.tasks if t.state is TaskState.LEASED and t.lease is not None}
        now_s = self._clock.monotonic_s()
        for number in [number for number, worker in before.items() if leases.get(number) != worker]:
            self._scheduler.ended((job.id, number), now_s, heard=_was_reported(job.tasks[number - 1]))
        for number in [number for number, worker in leases.items() if before.get(number) != worker]:
            self._scheduler.started(leases[number], self.as_waiting(job, job.tasks[number - 1]), now_s)
        if leases:
            self._leased[job.id] = leases

    def _count_job(self, job: Job, queued_before: int, queued_now: int) -> None:
        blocked = sum(task.state is TaskState.BLOCKED for task in job.tasks)
        more = queued_now - queued_before + blocked - self._blocked.pop(job.id, 0)
        self._count += more
        if job.check is None:
            self._counts[job.tenant] += more
            if not self._counts[job.tenant]:
                del self._counts[job.tenant]
        if blocked:
            self._blocked[job.id] = blocked

    def _observe_backoff(self, key: Key, task: Task) -> None:
        """Converted to the monotonic clock once, and at most the longest back-off we use: wall clocks jump."""
        if task.state is not TaskState.QUEUED or not task.not_before_s:
            self._backoffs.pop(key, None)
        elif self._backoffs.get(key, (0.0, 0.0))[1] != task.not_before_s:
            wait_s = min(BACKOFF_MAX_S, task.not_before_s - self._clock.now_s())
            self._backoffs[key] = (self._clock.monotonic_s() + wait_s, task.not_before_s)

    def release_due(self) -> None:
        """Offer the tasks whose back-off is over, in an order that is up to date."""
        self.rerank()
        now_s = self._clock.monotonic_s()
        due = [key for key, (until_s, _) in self._backoffs.items() if until_s <= now_s]
        due += self._after_waiting_for_sources()
        ready = (self.find(key) for key in due)
        self._offer(task for task in ready if task is not None and task.key not in self._withheld)

    def backoff_left_s(self, key: Key) -> float:
        """How long the task is not offered yet."""
        return max(0.0, self._backoffs.get(key, (0.0, 0.0))[0] - self._clock.monotonic_s())

    def find(self, key: Key) -> WaitingTask | None:
        """A queued task, offered or not."""
        return self._queued.get(key[0], {}).get(key[1])

    def _offer(self, tasks: Iterable[WaitingTask]) -> None:
        now_s = self._clock.monotonic_s()
        for task in tasks:
            if self.backoff_left_s(task.key) or self._scheduler.queues.get(task.key) == task:
                continue
            if self.source_of(task)[0]:
                self._waiting_for_source.setdefault(task.kind, set()).add(task.key)
            else:
                self._wait_no_more(task)
                self._scheduler.add(task, now_s)
        self.notify()

    def _wait_no_more(self, task: WaitingTask) -> None:
        waiting = self._waiting_for_source.get(task.kind)
        if waiting is not None:
            waiting.discard(task.key)
            if not waiting:
                del self._waiting_for_source[task.kind]

    def _after_waiting_for_sources(self) -> list[Key]:
        """Tasks of kinds that wait for no source any more; looks at some kinds, at other ones with every call."""
        ready: list[Key] = []
        for kind in list(islice(self._waiting_for_source, LOOK_KINDS)):
            keys = self._waiting_for_source.pop(kind)
            if self._source_of_kind(kind)[0]:
                self._waiting_for_source[kind] = keys
            else:
                ready += keys
        return ready

    def source_of(self, task: WaitingTask) -> tuple[str, float]:
        """The source of weights that the task waits for, and how long; empty for none."""
        return self._source_of_kind(task.kind)

    def _source_of_kind(self, kind: TaskKind) -> tuple[str, float]:
        return self._sources.wait_of(kind, lambda: self._scheduler.able_workers(kind))

    def without_waiting(self, tasks: Sequence[WaitingTask]) -> Sequence[WaitingTask]:
        """Of some tasks that a worker is to lease those that wait for no source; the others are offered later again."""
        waiting = {task.key for task in tasks if self.source_of(task)[0]}
        for task in tasks:
            if task.key in waiting:
                self._waiting_for_source.setdefault(task.kind, set()).add(task.key)
                self._scheduler.remove(task.key)
        return [task for task in tasks if task.key not in waiting]

    def notify(self) -> None:
        """Wake the workers for which the scheduler has something new."""
        for worker_id in self._scheduler.pop_changed_workers():
            self._notifier.notify(worker_id)

    def withhold(self, keys: Sequence[Key]) -> None:
        """The scheduler gives them to no other worker until they are released."""
        for key in keys:
            self._withheld.add(key)
            self._scheduler.remove(key)

    def release(self, keys: Sequence[Key]) -> None:
        """Those that still wait are offered again."""
        self._withheld.difference_update(keys)
        waiting = (self.find(key) for key in keys)
        self._offer(task for task in waiting if task is not None)


def _was_reported(task: Task) -> bool:
    """Its worker reported how it ended; False where a lease was lost."""
    is_made = task.state in (TaskState.JUDGING, TaskState.SUCCEEDED)
    return is_made or bool(task.attempts and task.attempts[-1].ending is Ending.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLine:
    """How much waits for one stage and checkpoint; the checkpoint is empty for stages that use none."""

    stage: str
    checkpoint: str
    waiting: int
    blocked: int
    leased: int
    # Of the waiting ones; 0 where there are none.
    oldest_age_s: float


def queue_lines(jobs: Iterable[Job], *, now_s: float) -> Sequence[QueueLine]:
    """A line for each stage and checkpoint of open tasks, for operators who scale workers."""
    tasks: dict[tuple[str, str], list[Task]] = {}
    for job in jobs:
        for task in job.tasks:
            if not task.state.ended:
                tasks.setdefault((task.stage, kind_of(job, task).checkpoint), []).append(task)
    return [_line(*which, each, now_s) for which, each in sorted(tasks.items())]


def _line(stage: str, checkpoint: str, tasks: Sequence[Task], now_s: float) -> QueueLine:
    def count(state: TaskState) -> int:
        return sum(task.state is state for task in tasks)

    queued_s = [task.queue_time_s for task in tasks if task.state is TaskState.QUEUED]
    return QueueLine(
        stage=stage,
        checkpoint=checkpoint,
        waiting=len(queued_s),
        blocked=count(TaskState.BLOCKED),
        leased=count(TaskState.LEASED),
        oldest_age_s=max(0.0, now_s - min(queued_s)) if queued_s else 0.0,
    )
