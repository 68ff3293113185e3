"""Sources of weights that cannot be reached: jobs that need something from there wait a while before they are tried.

Learned from the failed attempts in the job records, so that all gateways know the same, also after a restart. No
circuit breaker of a node counts such a failure, and a worker that holds the models gets the jobs at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from services.gateway.domain.blame import KINDS, SOURCE
from services.gateway.domain.job import Attempt, Job, Task
from services.gateway.domain.machine import BACKOFF_MAX_S, backoff_s
from services.gateway.ports import Clock
from services.gateway.scheduler.queue import TaskKind
from services.gateway.scheduler.workers import WorkerView
from services.kernel.logs import get_logger

log = get_logger()

# How many sources, and how many nodes and needs of each, are known; the oldest go first.
SOURCES_LIMIT = 256
NODES_LIMIT = 1_000
NEEDS_LIMIT = 1_000
# A source that failed nothing for so long begins with the shortest back-off again.
FORGET_S = 600.0


@dataclass(slots=True)
class _Source:
    count: int = 0
    # Wall clock: when an attempt failed last that counted.
    failed_s: float = 0.0
    # Monotonic: tasks wait until then.
    until_s: float = 0.0
    # Which nodes could not reach it, and what their tasks needed; as ordered sets.
    nodes: dict[str, None] = field(default_factory=dict)
    needs: dict[str, None] = field(default_factory=dict)

    def lacked_by(self, held: frozenset[str], needs: Iterable[str]) -> Iterator[str]:
        """Of the needs, those that come from here and are not held."""
        return (need for need in needs if need in self.needs and need.partition(":")[2] not in held)

    def fails_at(self, worker: WorkerView, kind: TaskKind) -> bool:
        """Tasks of the kind need something from here that the worker does not hold, and its node could not fetch."""
        return worker.node in self.nodes and any(self.lacked_by(worker.held, kind.parts))


class SourceBackoffs:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # By host.
        self._sources: dict[str, _Source] = {}

    def observe(self, job: Job) -> None:
        for task in job.tasks:
            failure = task.attempts[-1].failure if task.attempts else None
            if failure is not None and failure.part.startswith(SOURCE):
                self._note(failure.part.removeprefix(SOURCE), job, task, task.attempts[-1])

    def _note(self, host: str, job: Job, task: Task, attempt: Attempt) -> None:
        """Attempts that ran at the same time count once, however often they are observed."""
        age_s = self._clock.now_s() - attempt.end_time_s
        if not -BACKOFF_MAX_S <= age_s <= BACKOFF_MAX_S:
            return
        source = self._sources.setdefault(host, _Source())
        _remember(source.nodes, (attempt.node,), NODES_LIMIT)
        needs = (each for each in job.request_of(task).facts.parts if each.partition(":")[0] in KINDS)
        _remember(source.needs, needs, NEEDS_LIMIT)
        if attempt.end_time_s > source.failed_s <= attempt.lease_time_s:
            is_old = attempt.end_time_s - source.failed_s > FORGET_S
            source.count = 1 if is_old else source.count + 1
            source.failed_s = attempt.end_time_s
            wait_s = max(0.0, backoff_s(source.count, 1.0) - max(0.0, age_s))
            source.until_s = self._clock.monotonic_s() + wait_s
            log.warning("source_unreachable", source=host, node=attempt.node, for_s=round(wait_s))
            if len(self._sources) > SOURCES_LIMIT:
                del self._sources[next(iter(self._sources))]

    def _active(self) -> Iterator[tuple[str, _Source]]:
        now_s = self._clock.monotonic_s()
        return ((host, source) for host, source in self._sources.items() if source.until_s > now_s)

    def avoided(self, node: str, held: frozenset[str]) -> Sequence[tuple[str, str, float]]:
        """What the node cannot fetch now: needs, each with its source and for how many more seconds."""
        if not self._sources:
            return ()
        now_s = self._clock.monotonic_s()
        return [
            (need, host, source.until_s - now_s)
            for host, source in self._active()
            if node in source.nodes
            for need in source.lacked_by(held, source.needs)
        ]

    def wait_of(self, kind: TaskKind, able: Callable[[], Iterable[WorkerView]]) -> tuple[str, float]:
        """The source that tasks of the kind wait for, and how long; empty where a worker that is able can try.

        That is one that holds what comes from there, or whose node did not fail to fetch it.
        """
        found = ("", 0.0)
        if not self._sources:
            return found
        now_s = self._clock.monotonic_s()
        for host, source in self._active():
            is_needed = not source.needs.keys().isdisjoint(kind.parts)
            if is_needed and source.until_s - now_s > found[1] and all(source.fails_at(each, kind) for each in able()):
                found = (host, source.until_s - now_s)
        return found


def _remember(known: dict[str, None], names: Iterable[str], limit: int) -> None:
    known.update(dict.fromkeys(names))
    while len(known) > limit:
        del known[next(iter(known))]
