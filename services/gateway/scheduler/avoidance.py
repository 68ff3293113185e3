"""Which workers others go before, for a task that they could do: their node failed it, or fails such tasks. Pure.

Decided for each task: a worker that no other one can replace gets the task all the same, so no stage and no need ever
loses its last worker to a circuit breaker.
"""

from services.gateway.scheduler.queue import TaskKind, WaitingTask
from services.gateway.scheduler.workers import WorkerIndex, WorkerState, WorkerView


def all_failed(index: WorkerIndex, task: WaitingTask) -> bool:
    """Every node that could do it failed it once: then each may retry it. Linear in the workers of failed tasks."""
    if not task.failed_nodes:
        return False
    return all(worker.view.node in task.failed_nodes for group in index.able(task.kind) for worker in group)


def all_avoid(index: WorkerIndex, task: WaitingTask) -> bool:
    """Every worker that could do it is avoided for it, so that no other goes first. Linear if so."""
    if not task.failed_nodes and not index.avoiding:
        return False
    return all(worker.view.avoids(task) for group in index.able(task.kind) for worker in group)


def may(index: WorkerIndex, worker: WorkerState, task: WaitingTask) -> bool:
    """Whether the worker may be given a task that it can do: no other worker that can do it goes first."""
    if not worker.view.avoids(task):
        return True
    if worker.view.node in task.failed_nodes and not all_failed(index, task):
        return False
    return all_avoid(index, task)


def preferred(index: WorkerIndex, workers: list[WorkerState], task: WaitingTask) -> list[WorkerState]:
    """Of some workers that can do it, those that may be given it."""
    if not workers or not (task.failed_nodes or index.avoiding):
        return workers
    fresh = [each for each in workers if not each.view.avoids(task)]
    if fresh or not all_avoid(index, task):
        return fresh
    untried = [each for each in workers if each.view.node not in task.failed_nodes]
    return untried or (workers if all_failed(index, task) else [])


def can_another(index: WorkerIndex, kind: TaskKind, nodes: frozenset[str], *, within_s: float) -> bool:
    """Whether a worker of none of these nodes can do tasks of the kind, and is not avoided for them.

    `within_s`: how long it may take to fetch what they need.
    """
    return any(
        view.node not in nodes and not view.avoids_kind(kind) and _fetch_s(view, kind) <= within_s
        for group in index.able(kind)
        for view in (worker.view for worker in group)
    )


def _fetch_s(view: WorkerView, kind: TaskKind) -> float:
    return sum(view.size_of(model) for model in view.lacks(kind.models)) * 8 / view.link_bps
