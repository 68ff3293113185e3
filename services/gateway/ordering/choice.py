"""Which tasks the asking worker gets: by priority and age, and rather those whose checkpoint it holds.

A first policy. Whatever replaces it keeps the signature of `choose`.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice

from services.gateway.ordering.backlog import Backlog
from services.gateway.ordering.tasks import Asker, Kind, Waiting

# What does not need a checkpoint loaded may go first, until the other has waited this long.
STICKY_LIMIT_S = 30.0
# How many tasks of a kind are looked at before the kind is passed over.
LOOK_LIMIT = 256

# The nodes of live workers that can do tasks of a kind.
AbleNodes = Callable[[Kind], frozenset[str]]
# How many other workers wait idle for tasks of a kind.
IdleRivals = Callable[[Kind], int]


def choose(
    backlog: Backlog, asker: Asker, *, limit: int, able_nodes: AbleNodes, idle_rivals: IdleRivals, now_s: float
) -> list[Waiting]:
    """At most `limit` tasks of one kind for the asker, the best first; a task that must run alone comes alone.

    Where others wait idle, no more than the asker's share: two devices paint two pictures sooner than one.
    """
    if limit <= 0:
        return []
    candidates = (tasks for kind, tasks in backlog.by_kind() if asker.can(kind))
    heads = [head for tasks in candidates if (head := next(_fit(tasks, asker, able_nodes), None))]
    if not heads:
        return []
    best = min(heads, key=lambda task: (_rank_s(task, asker, now_s), task.key))
    if best.alone:
        return [best]
    limit = min(limit, math.ceil(backlog.count(best.kind) / (1 + idle_rivals(best.kind))))
    return list(islice((task for task in _fit(backlog.of_kind(best.kind), asker, able_nodes) if not task.alone), limit))


def _fit(tasks: Iterator[Waiting], asker: Asker, able_nodes: AbleNodes) -> Iterator[Waiting]:
    """Those that the asker's node should not leave to another one."""
    for task in islice(tasks, LOOK_LIMIT):
        if asker.node not in task.failed_nodes or able_nodes(task.kind) <= task.failed_nodes:
            yield task


def _rank_s(task: Waiting, asker: Asker, now_s: float) -> float:
    overdue = now_s - task.queue_time_s >= STICKY_LIMIT_S
    return task.rank_s if overdue else task.rank_s + STICKY_LIMIT_S * _distance(task.kind.checkpoint, asker)


def _distance(checkpoint: str, asker: Asker) -> float:
    """How far the checkpoint is from the asker's device: 0 in it, 1 not on the node at all."""
    if not checkpoint or checkpoint in asker.vram_models:
        return 0.0
    if checkpoint in asker.ram_models:
        return 0.25
    return 0.5 if checkpoint in asker.disk_models else 1.0
