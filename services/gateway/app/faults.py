"""What nodes fail at, shared by all gateways: a node that is broken for a model is left out of it for a while."""

from collections.abc import Callable

from fanlight.errors import AlreadyExists, Conflict
from services.gateway.app.records import Codec
from services.gateway.jobs.faults import NodeFaults, after_failure, after_success
from services.gateway.jobs.model import Job
from services.gateway.ports import CaughtUp, Clock, Deleted, JobStore
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "faults"
ROUNDS_LIMIT = 5

FAULTS: Codec[NodeFaults] = Codec(NodeFaults)
_NONE = NodeFaults()

Event = Callable[[NodeFaults], NodeFaults]


def blamed_need(job: Job, number: int) -> str:
    """What of a task its node is blamed for: the checkpoint, the annotator, or for other stages the stage itself."""
    task = job.tasks[number - 1]
    facts = job.request_of(task).facts
    if facts.checkpoint:
        return f"checkpoint:{facts.checkpoint}"
    return f"annotator:{facts.annotator}" if facts.annotator else f"stage:{task.stage}"


class Faults:
    def __init__(self, store: JobStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        # By node; only those that have some.
        self._known: dict[str, NodeFaults] = {}

    def skipped(self, node: str) -> frozenset[str]:
        """What the node must not be given now, such as `checkpoint:starter`."""
        known = self._known.get(node)
        return known.skipped(self._clock.now_s()) if known else frozenset()

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if isinstance(change, Deleted):
                self._known.pop(change.key, None)
            elif not isinstance(change, CaughtUp):
                self._known[change.key] = FAULTS.read(BUCKET, change) or _NONE

    async def note_failure(self, node: str, need: str) -> None:
        now_s = self._clock.now_s()
        faults = await self._change(node, lambda faults: after_failure(faults, need, now_s=now_s))
        if need in faults.skipped(now_s):
            log.warning("node_left_out", node=node, of=need, for_s=round(faults.of[need].until_s - now_s))

    async def note_success(self, node: str, need: str) -> None:
        if need in self._known.get(node, _NONE).of:
            await self._change(node, lambda faults: after_success(faults, need))

    async def _change(self, node: str, event: Event) -> NodeFaults:
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(BUCKET, node)
            before = (FAULTS.read(BUCKET, record) if record else None) or _NONE
            after = event(before)
            try:
                if after is not before and record is None:
                    await self._store.create(BUCKET, node, FAULTS.encode(after))
                elif after is not before and record is not None:
                    await self._store.put(BUCKET, node, FAULTS.encode(after), revision=record.revision)
            except (AlreadyExists, Conflict):
                continue
            self._known[node] = after
            return after
        return self._known.get(node, _NONE)
