"""Who goes last for a while: a node that keeps failing one thing, and a worker that is slow or fails much.

Circuit breakers are shared by all gateways; each gateway judges stragglers for itself.
"""

from collections.abc import Callable, Iterable, Sequence

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.records import Codec, Records
from services.gateway.app.source_backoffs import SourceBackoffs
from services.gateway.domain.blame import is_own_fault, stage_need
from services.gateway.domain.circuit_breaker import (
    BreakerKey,
    CircuitBreaker,
    NodeBreakers,
    after_failure,
    after_success,
)
from services.gateway.domain.job import Attempt, Ending, Facts, Job, Task, TaskState
from services.gateway.domain.workers import Avoidance, Worker
from services.gateway.ports import CaughtUp, Clock, Deleted
from services.gateway.scheduler.pace import SpeedStats
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "faults"
ROUNDS_LIMIT = 5
# How long a straggler gets no tasks that others can do; then it is judged again.
SET_ASIDE_S = 900.0
# At most this part of the workers that were judged lately, so that no mistake empties a fleet.
SHARE_MAX = 0.2

BREAKERS: Codec[NodeBreakers] = Codec(NodeBreakers)
_NONE = NodeBreakers()

Event = Callable[[NodeBreakers], NodeBreakers]


class CircuitBreakers:
    """Of every node, cached in memory and kept up by watching the store; changes are compare-and-set."""

    def __init__(self, store: Records, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        # By node; only nodes that failed something.
        self._known: dict[str, NodeBreakers] = {}

    def open(self, node: str, stage: str, device: str) -> Sequence[CircuitBreaker]:
        """The open circuit breakers of the node's workers of that stage and device."""
        known = self._known.get(node)
        if known is None:
            return ()
        found = known.open(self._clock.now_s())
        return [each for each in found if (each.key.stage, each.key.device) == (stage, device)]

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if isinstance(change, Deleted):
                self._known.pop(change.key, None)
            elif not isinstance(change, CaughtUp):
                self._known[change.key] = self._store.read(BREAKERS, BUCKET, change) or _NONE

    async def note_failure(self, node: str, key: BreakerKey, reason: str, *, lease_s: float, weight: int = 1) -> None:
        """`lease_s` and `weight`: as for `after_failure`."""
        now_s = self._clock.now_s()
        breakers = await self._change(
            node,
            lambda before: after_failure(before, key, reason=reason, lease_s=lease_s, weight=weight, now_s=now_s),
        )
        failed = breakers.find(key)
        if failed is not None and failed.is_open(now_s):
            for_s = round(failed.until_s - now_s)
            log.warning("circuit_breaker_opened", node=node, need=key.need, device=key.device, for_s=for_s)

    async def note_success(self, node: str, keys: Iterable[BreakerKey]) -> None:
        if self._known.get(node, _NONE).breakers:
            await self._change(node, lambda before: after_success(before, keys))

    async def sweep(self) -> None:
        """Delete the records of nodes that failed nothing for long."""
        now_s = self._clock.now_s()
        for node in [node for node, known in self._known.items() if known.is_stale(now_s)]:
            await self._store.delete(BUCKET, node)
            self._known.pop(node, None)

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

    It never sets aside the last live worker of a stage. Tasks of one job, or that ran at the same
    time, count once where they fail at a worker.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        device_of: Callable[[str], str],
        live_of: Callable[[str], Iterable[str]],
        note_task: Callable[[str, Facts, float], None],
    ) -> None:
        """`live_of`: the ids of the live workers of a stage that take tasks. `note_task`: told what each took."""
        self._note_task = note_task
        self._clock = clock
        self._device_of, self._live_of = device_of, live_of
        self._paces = SpeedStats()
        # Worker id to why it is set aside, and until when in monotonic seconds.
        self._aside: dict[str, tuple[str, float]] = {}
        # The stage of each worker that was judged lately.
        self._judged: dict[str, str] = {}
        # Of open jobs: how many ended attempts of each task were counted.
        self._counted: dict[str, dict[int, int]] = {}
        # Of open jobs: the workers for which a failure of theirs was counted.
        self._failed_by: dict[str, set[str]] = {}
        # By worker: when the failure ended that was counted last.
        self._failed_s: dict[str, float] = {}

    def observe(self, job: Job) -> None:
        before = self._counted.pop(job.id, {})
        now: dict[int, int] = {}
        for task in job.tasks:
            now[task.number] = len(task.attempts) + (task.state is TaskState.SUCCEEDED)
            if now[task.number] > before.get(task.number, 0):
                self._learn(job, task)
        if not job.state.ended and any(now.values()):
            self._counted[job.id] = now
        else:
            self._failed_by.pop(job.id, None)

    def _learn(self, job: Job, task: Task) -> None:
        """Learn from how the task's newest attempt ended; what its node merely lacked says nothing about the worker."""
        if task.state is TaskState.SUCCEEDED and task.lease is not None:
            worker, alike = task.lease.worker, task.lease.batch_size
            took_s = (task.end_time_s - task.lease.time_s) / max(1, alike)
            self._paces.done(worker, self._class_of(worker, task), _work_of(job, task), took_s)
            self._note_task(worker, job.request_of(task).facts, took_s)
            self._judge(worker, task.stage)
            for refusal in task.refusals:
                self._fail(job, task, refusal)
        elif task.attempts and task.attempts[-1].ending is Ending.FAILED:
            attempt = task.attempts[-1]
            if is_own_fault(attempt.failure) and not attempt.refused:
                self._fail(job, task, attempt)

    def _fail(self, job: Job, task: Task, attempt: Attempt) -> None:
        worker, failed_by = attempt.worker, self._failed_by.setdefault(job.id, set())
        is_known = attempt.lease_time_s < self._failed_s.get(worker, 0.0) <= attempt.end_time_s
        if worker not in failed_by and not is_known:
            failed_by.add(worker)
            self._failed_s[worker] = attempt.end_time_s
            self._paces.failed(worker, self._class_of(worker, task))
            self._judge(worker, task.stage)

    def _class_of(self, worker: str, task: Task) -> tuple[str, str]:
        return task.stage, self._device_of(worker)

    def _judge(self, worker: str, stage: str) -> None:
        self._judged[worker] = stage
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

    def left_s(self, worker: str) -> float:
        """For how long it is still set aside."""
        return max(0.0, self._aside.get(worker, ("", 0.0))[1] - self._clock.monotonic_s())

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
        self._failed_s.pop(worker, None)
        self._aside.pop(worker, None)


class Avoidances:
    """Which tasks a worker gets only where no other worker can do them, for whatever reason."""

    def __init__(
        self, breakers: CircuitBreakers, sources: SourceBackoffs, stragglers: StragglerDetector, clock: Clock
    ) -> None:
        self._breakers, self._sources, self._stragglers = breakers, sources, stragglers
        self._clock = clock

    def of(self, worker: Worker) -> Sequence[Avoidance]:
        now_s = self._clock.now_s()
        found = [
            Avoidance(need=each.key.need, why=each.why, until_s=each.until_s)
            for each in self._breakers.open(worker.node, worker.stage, worker.device)
        ]
        for need, host, left_s in self._sources.avoided(worker.node, worker.held_models):
            found.append(Avoidance(need=need, why=f"the node cannot reach {host}", until_s=now_s + left_s))
        if why := self._stragglers.fault_of(worker.id):
            until_s = now_s + self._stragglers.left_s(worker.id)
            found.append(Avoidance(need=stage_need(worker.stage), why=why, until_s=until_s))
        return found


def _work_of(job: Job, task: Task) -> object:
    """Tasks are compared where this is equal."""
    return task.stage, job.request_of(task).facts
