"""Waiting tasks: what the scheduler knows of each, and the queues they wait in. Pure."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nsmallest

# (job id, task number)
Key = tuple[str, int]
# How much of something a task takes, or a worker at most, by name such as `pixels`; sorted.
Amounts = tuple[tuple[str, int], ...]
# A queue's stage with its checkpoint; or for work without a checkpoint, with what it needs.
QueueId = tuple[str, str] | tuple[str, frozenset[str]]


def can_do(offers: frozenset[str], limits: Amounts, needs: frozenset[str], amounts: Amounts) -> bool:
    """Whether a worker can do a task: it offers all needs and takes each amount. Without a limit it takes any amount.

    The one place that decides it: for a worker, for a group of workers and for all known workers.
    """
    if not needs <= offers:
        return False
    for name, amount in amounts:
        limit = limit_of(limits, name)
        if limit is not None and amount > limit:
            return False
    return True


def exceeded(limits: Amounts, amounts: Amounts) -> Iterator[tuple[str, int, int]]:
    """Name, limit and amount of each limit that is too low."""
    for name, amount in amounts:
        limit = limit_of(limits, name)
        if limit is not None and amount > limit:
            yield name, limit, amount


def limit_of(limits: Amounts, name: str) -> int | None:
    """None for no limit."""
    index = bisect_left(limits, (name,))
    if index < len(limits):
        found, limit = limits[index]
        return limit if found == name else None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskKind:
    """Tasks of one kind can run in one batch, and on the same workers."""

    stage: str
    # What a worker must offer, such as `annotator:canny`.
    needs: frozenset[str]
    # What it must take at least, such as `pixels`.
    amounts: Amounts = ()
    # Empty for stages without checkpoints. Work goes to the workers that hold its checkpoint, because it is large.
    checkpoint: str = ""
    # Of its checkpoint; empty where that is not known before it is fetched.
    family: str = ""
    # All models that must be on the node, the checkpoint too. The small ones are fetched to where the checkpoint is.
    models: frozenset[str] = frozenset()
    # Of what it needs that which may fail on a node, by kind and name, such as `lora:hf:org/repo`.
    parts: frozenset[str] = frozenset()
    # LoRAs with their weights, which are part of a batch's UNet.
    loras: tuple[tuple[str, float], ...] = ()
    width_px: int = 0
    height_px: int = 0
    # What `fanlight.contract` makes of the size; 0 where the size is not known before the work begins.
    size_class: int = 0
    guided: bool = False

    def __post_init__(self) -> None:
        assert bool(self.size_class) == bool(self.width_px and self.height_px), "a size and its class go together"

    @property
    def combination(self) -> tuple[str, tuple[tuple[str, float], ...]]:
        """What one patched copy of the weights is for."""
        return self.checkpoint, self.loras


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingTask:
    """A task that could be leased now."""

    key: Key
    kind: TaskKind
    # In virtual time, see `shares`: the smaller, the sooner.
    rank_s: float
    # Since when this task could have been leased.
    queue_time_s: float
    # Evaluations of the model; 0 for stages without.
    steps: int = 0
    alone: bool = False
    failed_nodes: frozenset[str] = frozenset()
    tenant: str = ""


def queue_of(kind: TaskKind) -> QueueId:
    return (kind.stage, kind.checkpoint) if kind.checkpoint else (kind.stage, kind.needs)


class TaskQueues:
    """The waiting tasks: a queue for each checkpoint, and one for each kind of work that needs no checkpoint.

    Adding and removing cost the logarithm of a queue's length.
    """

    def __init__(self) -> None:
        self._tasks: dict[Key, WaitingTask] = {}
        self._queues: dict[QueueId, list[tuple[float, Key]]] = {}
        # Each tenant's part of each queue.
        self._own: dict[tuple[QueueId, str], list[tuple[float, Key]]] = {}
        # Queues of work without a checkpoint, by stage.
        self._plain: dict[str, set[QueueId]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, key: Key) -> bool:
        return key in self._tasks

    def get(self, key: Key) -> WaitingTask | None:
        return self._tasks.get(key)

    def add(self, task: WaitingTask) -> None:
        assert task.key not in self._tasks
        self._tasks[task.key] = task
        queue_id = queue_of(task.kind)
        queue = self._queues.get(queue_id)
        if queue is None:
            queue = self._queues[queue_id] = []
            if not task.kind.checkpoint:
                self._plain.setdefault(task.kind.stage, set()).add(queue_id)
        insort(queue, (task.rank_s, task.key))
        insort(self._own.setdefault((queue_id, task.tenant), []), (task.rank_s, task.key))

    def remove(self, key: Key) -> WaitingTask | None:
        task = self._tasks.pop(key, None)
        if task is None:
            return None
        queue_id = queue_of(task.kind)
        queue = self._queues[queue_id]
        del queue[bisect_left(queue, (task.rank_s, key))]
        own = self._own[queue_id, task.tenant]
        del own[bisect_left(own, (task.rank_s, key))]
        if not own:
            del self._own[queue_id, task.tenant]
        if not queue:
            del self._queues[queue_id]
            if not task.kind.checkpoint:
                self._plain[task.kind.stage].discard(queue_id)
        return task

    def position(self, task: WaitingTask) -> int:
        """How many of its tenant's tasks come before it in its queue: other tenants' are nobody's business."""
        return bisect_left(self._own[queue_of(task.kind), task.tenant], (task.rank_s, task.key))

    def first(self, queue_id: QueueId, count: int) -> list[WaitingTask]:
        """Up to that many tasks of a queue, in order of rank."""
        return [self._tasks[key] for _, key in self._queues.get(queue_id, ())[:count]]

    def fronts(self, stage: str, queues: int, count: int) -> list[WaitingTask]:
        """The first tasks, up to `count` of each, of those queues of a stage whose first task ranks first."""
        of_stage = (queue_id for queue_id in self._queues if queue_id[0] == stage)
        ids = nsmallest(queues, of_stage, key=lambda queue_id: self._queues[queue_id][0])
        return [task for queue_id in ids for task in self.first(queue_id, count)]

    def oldest(self, stage: str, held: frozenset[str], count: int) -> list[QueueId]:
        """Of the queues that a worker holding these models could serve, those whose first task ranks first."""
        return nsmallest(count, self._for_holder(stage, held), key=lambda queue_id: self._queues[queue_id][0])

    def _for_holder(self, stage: str, held: frozenset[str]) -> Iterator[QueueId]:
        """The queues of the checkpoints that a worker holds, and of work without a checkpoint."""
        yield from list(self._plain.get(stage, ()))
        if len(held) <= len(self._queues):
            yield from [(stage, model) for model in held if (stage, model) in self._queues]
        else:
            yield from [each for each in self._queues if each[0] == stage and each[1] in held]
