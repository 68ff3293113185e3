"""The live leases and when each one expires, on this gateway's own clock. Renewing one writes nothing.

A lease that the gateway finds in its store when it starts has its whole time before it again. One that another gateway
renews has more: only if that gateway is gone as well is it this one's to end.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from services.gateway.jobs.model import Job, Task, TaskState
from services.gateway.ordering.tasks import Key
from services.gateway.ports import Clock

# How many times its own time a lease has that another gateway looks after.
FOREIGN_TTLS = 2.0
# A lease whose task reports nothing new for so long is lost, however often it is renewed.
STALL_LIMIT_S = 3_600.0


@dataclass(slots=True)
class HeldLease:
    token: str
    key: Key
    worker: str
    deadline_s: float
    # When something about it was last new.
    moved_s: float
    # This gateway hears its worker.
    is_local: bool = False
    step: int = 0
    steps: int = 0


class Leases:
    def __init__(
        self, clock: Clock, *, ttl_s: float, is_shared: bool = False, stall_limit_s: float = STALL_LIMIT_S
    ) -> None:
        """`is_shared`: other gateways look after leases too, and tell of them."""
        self.ttl_s = ttl_s
        self._stall_limit_s = stall_limit_s
        self._foreign_ttl_s = ttl_s * (FOREIGN_TTLS if is_shared else 1.0)
        self._clock = clock
        self._by_key: dict[Key, HeldLease] = {}
        self._by_token: dict[str, HeldLease] = {}
        self._of_worker: dict[str, dict[str, HeldLease]] = {}

    def observe(self, job: Job) -> None:
        for task in job.tasks:
            self._observe(job, task)

    def _observe(self, job: Job, task: Task) -> None:
        key = (job.id, task.number)
        token = task.lease.token if task.lease and task.state is TaskState.LEASED else ""
        held = self._by_key.get(key)
        if held is not None and held.token == token:
            return
        if held is not None:
            self._drop(held)
        if task.lease and token:
            now_s = self._clock.monotonic_s()
            held = HeldLease(token, key, task.lease.worker, now_s + self._foreign_ttl_s, now_s)
            self._by_key[key] = self._by_token[token] = held
            self._of_worker.setdefault(held.worker, {})[token] = held

    def _drop(self, held: HeldLease) -> None:
        del self._by_key[held.key], self._by_token[held.token], self._of_worker[held.worker][held.token]
        if not self._of_worker[held.worker]:
            del self._of_worker[held.worker]

    def renew(self, token: str) -> HeldLease | None:
        """The lease, with its whole time before it; None where it is not live."""
        held = self._by_token.get(token)
        if held is not None:
            held.deadline_s = self._clock.monotonic_s() + self.ttl_s
            held.is_local = True
        return held

    def heard(self, token: str, step: int, steps: int) -> None:
        """Another gateway says that the lease was renewed there."""
        held = self._by_token.get(token)
        if held is not None:
            held.deadline_s = self._clock.monotonic_s() + self._foreign_ttl_s
            held.is_local = False
            self.move(held, step, steps)

    def move(self, held: HeldLease, step: int, steps: int) -> None:
        """Its task is that far."""
        if (held.step, held.steps) != (step, steps):
            held.step, held.steps, held.moved_s = step, steps, self._clock.monotonic_s()

    def of_worker(self, worker_id: str) -> list[HeldLease]:
        return list(self._of_worker.get(worker_id, {}).values())

    def due(self) -> list[HeldLease]:
        now_s = self._clock.monotonic_s()
        stalled_s = now_s - self._stall_limit_s
        return [held for held in self._by_token.values() if held.deadline_s <= now_s or held.moved_s <= stalled_s]

    def postpone(self, late_s: float) -> None:
        """This process stood still that long, and could hear no renewals meanwhile."""
        for held in self._by_token.values():
            held.deadline_s += late_s
            held.moved_s += late_s

    def with_progress(self, job: Job) -> Job:
        """The job with how far its leased tasks are."""
        return job if job.state.ended else replace(job, tasks=tuple(self._progressed(job.id, job.tasks)))

    def _progressed(self, job_id: str, tasks: Iterable[Task]) -> Iterable[Task]:
        for task in tasks:
            held = self._by_key.get((job_id, task.number))
            yield replace(task, step=held.step, steps=held.steps) if held else task
