"""Lease tokens, and the live leases with their expiry on this gateway's monotonic clock. A renewal writes no record.

A lease that the gateway finds in its store when it starts has its full time to live again. One that another gateway
renews has longer: this gateway expires it only if the other one is gone as well.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from fanlight.contract.limits import size_class
from fanlight.errors import LeaseLost
from services.gateway.app.watch import TaskProgress
from services.gateway.domain.job import Job, Task, TaskState
from services.gateway.domain.nodes import node_of
from services.gateway.domain.progress import EVALUATIONS_PER_STEP_MAX, LeaseProgress, Phase, StallLimits
from services.gateway.ports import Clock
from services.gateway.scheduler.queue import Key

SECRET_BYTES = 16

RandomBytes = Callable[[int], bytes]
# How many times its time to live a lease has while another gateway renews it.
FOREIGN_TTLS = 2.0


def new_token(key: Key, random_bytes: RandomBytes) -> str:
    return f"{key[0]}.{key[1]}.{random_bytes(SECRET_BYTES).hex()}"


def task_key_of(token: str) -> Key:
    """The task that the token is for; workers treat it as opaque. LeaseLost for what is not a token of ours."""
    job_id, _, rest = token.partition(".")
    number, _, secret = rest.partition(".")
    if not (job_id and number.isdecimal() and len(number) < 4 and secret):
        raise LeaseLost("this is not a lease token; drop the work")
    return job_id, int(number)


@dataclass(slots=True)
class LiveLease:
    token: str
    key: Key
    worker: str
    deadline_s: float
    # When it last made progress.
    moved_s: float
    # What its task evaluates: the model's family, the image's size class, and the highest step that counts; 0: unknown.
    family: str = ""
    size_class: int = 0
    evaluations_max: int = 0
    # Its worker renews it at this gateway.
    is_local: bool = False
    progress: LeaseProgress = field(default_factory=LeaseProgress)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSpeed:
    """A worker's own, for one kind of task. `evaluation_s`: None where it was not measured."""

    evaluation_s: float | None = None
    slots: int = 1


class LeaseTable:
    """The live leases by task, token and worker."""

    def __init__(self, clock: Clock, *, ttl_s: float, stall: StallLimits, is_shared: bool = False) -> None:
        """`is_shared`: other gateways renew leases too, and report them in heartbeats."""
        self.ttl_s = ttl_s
        self._stall = stall
        self._foreign_ttl_s = ttl_s * (FOREIGN_TTLS if is_shared else 1.0)
        self._clock = clock
        self._by_key: dict[Key, LiveLease] = {}
        self._by_token: dict[str, LiveLease] = {}
        self._of_worker: dict[str, dict[str, LiveLease]] = {}

    def observe(self, job: Job) -> None:
        for task in job.tasks:
            self._observe(job, task)

    def _observe(self, job: Job, task: Task) -> None:
        key = (job.id, task.number)
        token = task.lease.token if task.lease and task.state is TaskState.LEASED else ""
        lease = self._by_key.get(key)
        if lease is not None and lease.token == token:
            return
        if lease is not None:
            self._drop(lease)
        if task.lease and token:
            now_s = self._clock.monotonic_s()
            facts = job.request_of(task).facts
            lease = LiveLease(
                token,
                key,
                task.lease.worker,
                now_s + self._foreign_ttl_s,
                now_s,
                family=facts.family,
                size_class=size_class(facts.width_px, facts.height_px),
                evaluations_max=facts.steps * EVALUATIONS_PER_STEP_MAX,
            )
            self._by_key[key] = self._by_token[token] = lease
            self._of_worker.setdefault(lease.worker, {})[token] = lease

    def _drop(self, lease: LiveLease) -> None:
        del self._by_key[lease.key], self._by_token[lease.token], self._of_worker[lease.worker][lease.token]
        if not self._of_worker[lease.worker]:
            del self._of_worker[lease.worker]

    def renew(self, token: str) -> LiveLease | None:
        """The lease, with its full time to live again; None where it is not live."""
        lease = self._by_token.get(token)
        if lease is not None:
            lease.deadline_s = self._clock.monotonic_s() + self.ttl_s
            lease.is_local = True
        return lease

    def renewed_elsewhere(self, token: str, step: int, steps: int, fetched_bytes: int) -> None:
        """Another gateway reports in a heartbeat that the lease was renewed there."""
        lease = self._by_token.get(token)
        if lease is not None:
            lease.deadline_s = self._clock.monotonic_s() + self._foreign_ttl_s
            lease.is_local = False
            self._note_step(lease, step, steps)
            self._note(lease, lease.progress.at_bytes_elsewhere(fetched_bytes))

    def note_progress(self, lease: LiveLease, reported: TaskProgress) -> None:
        """Take in its task's progress."""
        if reported.fetching is None:
            self._note_step(lease, reported.step, reported.steps)
        else:
            fetch = reported.fetching
            self._note(lease, lease.progress.at_bytes(fetch.reference, fetch.done_bytes, fetch.total_bytes))

    def _note_step(self, lease: LiveLease, step: int, steps: int) -> None:
        self._note(lease, lease.progress.at_step(step, steps, evaluations_max=lease.evaluations_max))

    def _note(self, lease: LiveLease, progress: LeaseProgress) -> None:
        if progress.is_beyond(lease.progress):
            lease.moved_s = self._clock.monotonic_s()
        lease.progress = progress

    def of_worker(self, worker_id: str) -> list[LiveLease]:
        return list(self._of_worker.get(worker_id, {}).values())

    def find(self, token: str) -> LiveLease | None:
        return self._by_token.get(token)

    def all(self) -> list[LiveLease]:
        return list(self._by_token.values())

    def of_node(self, node_id: str) -> list[LiveLease]:
        """Those of the workers whose ids derive from the node's."""
        workers = [each for each in self._of_worker if node_of(each) == node_id]
        return [lease for worker in workers for lease in self.of_worker(worker)]

    def due(self) -> list[LiveLease]:
        """Those that were not renewed in time."""
        now_s = self._clock.monotonic_s()
        return [lease for lease in self._by_token.values() if lease.deadline_s <= now_s]

    def stalled(self, measured: Callable[[LiveLease], MeasuredSpeed]) -> list[tuple[LiveLease, float]]:
        """Those whose task has come no further for too long, however often they are renewed; and for how long.

        `measured`: how fast its worker is with such tasks.
        """
        now_s = self._clock.monotonic_s()
        found = []
        for lease in self._by_token.values():
            idle_s = now_s - lease.moved_s
            if idle_s >= self._stall.floor_s and idle_s >= self._limit_s(lease, measured(lease), now_s):
                found.append((lease, idle_s))
        return found

    def _limit_s(self, lease: LiveLease, speed: MeasuredSpeed, now_s: float) -> float:
        limit_s = self._stall.limit_s(lease.progress, evaluation_s=speed.evaluation_s, slots=speed.slots)
        if lease.progress.phase is not Phase.BEGINNING:
            return limit_s
        # Its turn has not come while the worker's device has other tasks, which come further.
        latest_s = max(other.moved_s for other in self._of_worker[lease.worker].values())
        return self._stall.longest_s if now_s - latest_s < limit_s else limit_s

    def postpone(self, late_s: float) -> None:
        """This process stood still that long and could receive no renewals: no worker is to blame."""
        for lease in self._by_token.values():
            lease.deadline_s += late_s
            lease.moved_s += late_s

    def with_progress(self, job: Job) -> Job:
        """The job with the progress of its leased tasks."""
        return job if job.state.ended else replace(job, tasks=tuple(self._progressed(job.id, job.tasks)))

    def _progressed(self, job_id: str, tasks: Iterable[Task]) -> Iterable[Task]:
        for task in tasks:
            lease = self._by_key.get((job_id, task.number))
            yield replace(task, step=lease.progress.step, steps=lease.progress.steps) if lease else task
