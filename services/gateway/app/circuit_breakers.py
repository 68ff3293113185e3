"""Circuit breakers, shared by all gateways: a node that keeps failing one thing gets no tasks for it for a while."""

from collections.abc import Callable

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.job_store import Codec
from services.gateway.domain.circuit_breaker import NodeBreakers, after_failure, after_success
from services.gateway.domain.job import Job
from services.gateway.ports import CaughtUp, Clock, Deleted, RecordStore
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "faults"
ROUNDS_LIMIT = 5

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

    def __init__(self, store: RecordStore, clock: Clock) -> None:
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
                self._known[change.key] = BREAKERS.read(BUCKET, change) or _NONE

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
            before = (BREAKERS.read(BUCKET, record) if record else None) or _NONE
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
