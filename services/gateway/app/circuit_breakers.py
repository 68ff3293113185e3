"""Who gets no tasks for a while: a node that keeps failing one thing, and a worker that is slow or fails much.

Circuit breakers are shared by all gateways; each gateway judges stragglers for itself.
"""

from collections.abc import Callable, Iterable

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.records import Codec, Records
from services.gateway.domain.circuit_breaker import NOT_HERE, NodeBreakers, after_failure, after_success
from services.gateway.domain.job import Attempt, Ending, Job, Task, TaskState
from services.gateway.ports import CaughtUp, Clock, Deleted
from services.gateway.scheduler.pace import SpeedStats
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "faults"
ROUNDS_LIMIT = 5
# How long a straggler gets no tasks; then it is judged again.
SET_ASIDE_S = 900.0
# At most this part of the workers that were judged lately, so that no mistake empties a fleet.
SHARE_MAX = 0.2

BREAKERS: Codec[NodeBreakers] = Codec(NodeBreakers)
_NONE = NodeBreakers()

Event = Callable[[NodeBreakers], NodeBreakers]


def blamed_need(job: Job, number: int) -> str:
    """Whose circuit breaker counts the task: that of its checkpoint, its annotator, or for other stages the stage."""
    task = job.tasks[number - 1]
    facts = job.request_of(task).facts
    if facts.checkpoint:
        return f"checkpoint:{facts.checkpoint}"
    return f"annotator:{facts.annotator}" if facts.annotator else f"stage:{task.stage}"


class CircuitBreakers:
    """Of every node, cached in memory and kept up by watching the store; changes are compare-and-set."""

    def __init__(self, store: Records, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        # By node; only nodes that failed something.
        self._known: dict[str, NodeBreakers] = {}

    def open_needs(self, node: str) -> frozenset[str]:
        """The needs whose circuit breaker is open for the node, such as `checkpoint:starter`."""
        known = self._known.get(node)
        return known.open_needs(self._clock.now_s()) if known else frozenset()

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if isinstance(change, Deleted):
                self._known.pop(change.key, None)
            elif not isinstance(change, CaughtUp):
                self._known[change.key] = self._store.read(BREAKERS, BUCKET, change) or _NONE

    async def note_failure(self, node: str, need: str) -> None:
        now_s = self._clock.now_s()
        breakers = await self._change(node, lambda breakers: after_failure(breakers, need, now_s=now_s))
        if need in breakers.open_needs(now_s):
            log.warning("circuit_breaker_opened", node=node, need=need, for_s=round(breakers.of[need].until_s - now_s))

    async def note_success(self, node: str, need: str) -> None:
        if need in self._known.get(node, _NONE).of:
            await self._change(node, lambda breakers: after_success(breakers, need))

    async def _change(self, node: str, event: Event) -> NodeBreakers:
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(BUCKET, node)
            before = (self._store.read(BREAKERS, BUCKET, record) if record else None) or _NONE
            after = event(before)
            try:
                if after is not before and record is None:
                    await self._store.create(BUCKET, node, BREAKERS.encode(after))
                elif after is not before and record is not None:
                    await self._store.put(BUCKET, node, BREAKERS.encode(after), revision=record.revision)
            except (AlreadyExists, Conflict):
                continue
            self._known[node] = after
            return after
        return self._known.get(node, _NONE)


class StragglerDetector:
    """Finds workers that are slow, or fail much, against others of their stage and device; they come back on trial.

    It never sets aside the last live worker of a stage.
    """

    def __init__(
        self, clock: Clock, *, device_of: Callable[[str], str], live_of: Callable[[str], Iterable[str]]
    ) -> None:
        """`live_of`: the ids of the live workers of a stage that take tasks."""
        self._clock = clock
        self._device_of, self._live_of = device_of, live_of
        self._paces = SpeedStats()
        # Worker id to why it is set aside, and until when in monotonic seconds.
        self._aside: dict[str, tuple[str, float]] = {}
        # The stage of each worker that was judged lately.
        self._judged: dict[str, str] = {}
        # Of open jobs: how many ended attempts of each task were counted.
        self._counted: dict[str, dict[int, int]] = {}

    def observe(self, job: Job) -> None:
        before = self._counted.pop(job.id, {})
        now: dict[int, int] = {}
        for task in job.tasks:
            now[task.number] = len(task.attempts) + (task.state is TaskState.SUCCEEDED)
            if now[task.number] > before.get(task.number, 0):
                self._learn(job, task)
        if not job.state.ended and any(now.values()):
            self._counted[job.id] = now

    def _learn(self, job: Job, task: Task) -> None:
        """Learn from how the task's newest attempt ended; what its node merely lacked says nothing about the worker."""
        if task.state is TaskState.SUCCEEDED and task.lease is not None:
            worker, alike = task.lease.worker, task.lease.batch_size
            took_s = (task.end_time_s - task.lease.time_s) / max(1, alike)
            self._paces.done(worker, self._class_of(worker, task), _work_of(job, task), took_s)
        elif task.attempts and task.attempts[-1].ending is Ending.FAILED and not _is_not_here(task.attempts[-1]):
            worker = task.attempts[-1].worker
            self._paces.failed(worker, self._class_of(worker, task))
        else:
            return
        self._judged[worker] = task.stage
        self._judge(worker)

    def _class_of(self, worker: str, task: Task) -> tuple[str, str]:
        return task.stage, self._device_of(worker)

    def _judge(self, worker: str) -> None:
        why = self._paces.fault_of(worker)
        if not why or self._fault_of(worker):
            return
        judged = [each for each, stage in self._judged.items() if stage == self._judged[worker]]
        aside = sum(each in self._aside for each in judged)
        if len(judged) > 1 and aside + 1 <= max(1.0, SHARE_MAX * len(judged)) and self._has_others(worker):
            self._aside[worker] = (why, self._clock.monotonic_s() + SET_ASIDE_S)
            log.warning("straggler_set_aside", worker=worker, why=why, for_s=SET_ASIDE_S)

    def _has_others(self, worker: str) -> bool:
        """Whether its stage has another live worker that is not set aside."""
        live = self._live_of(self._judged[worker])
        return any(each != worker and not self._fault_of(each) for each in live)

    def fault_of(self, worker: str) -> str:
        """Why it is set aside; empty where it is not, also while no other worker of its stage is live."""
        why = self._fault_of(worker)
        return why if why and self._has_others(worker) else ""

    def _fault_of(self, worker: str) -> str:
        why, until_s = self._aside.get(worker, ("", 0.0))
        if why and until_s <= self._clock.monotonic_s():
            del self._aside[worker]
            self._paces.forget(worker)
            return ""
        return why

    def forget(self, worker: str) -> None:
        self._paces.forget(worker)
        self._judged.pop(worker, None)
        self._aside.pop(worker, None)


def _is_not_here(attempt: Attempt) -> bool:
    return attempt.failure is not None and attempt.failure.reason in NOT_HERE


def _work_of(job: Job, task: Task) -> object:
    """Tasks are compared where this is equal."""
    return task.stage, job.request_of(task).facts
