"""When a worker would finish a task, downloads included. Placing, stealing and explaining all use this one sum."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.gateway.scheduler.queue import TaskKind, WaitingTask
from services.gateway.scheduler.workers import WorkerState

# From disk to RAM and from RAM to VRAM, in bytes a second: a consumer's NVMe and PCIe.
DISK_BYTES_PER_S = 2e9
BUS_BYTES_PER_S = 10e9
# To patch in one LoRA of 150 MB, which is rank 128 for SD 1.5's attention and text encoder: 0.075 s to read it (it is
# unknown whether a file is in RAM), 0.015 s on the bus, 0.03 s on a consumer's card (90 GFLOP, and 7 GB of copies to
# float32, sums and back), 0.035 s for the calls. Nothing where the task before it had the same combination: the engine
# still has its copies.
PATCH_S = 0.155
# A load costs other tasks too: it evicts from RAM what they will have to load again, and they wait for it meanwhile.
LOAD_WEIGHT = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds from now; what is fetched while the worker is busy adds no time."""

    # Until the worker has done what comes before.
    slot_s: float
    # Until the models are on its disk.
    fetch_s: float
    fetch_bytes: int
    load_s: float
    patch_s: float
    run_s: float

    @property
    def start_s(self) -> float:
        return max(self.slot_s, self.fetch_s)

    @property
    def finish_s(self) -> float:
        return self.start_s + self.load_s + self.patch_s + self.run_s

    @property
    def cost_s(self) -> float:
        """What workers are compared by."""
        return self.finish_s + (LOAD_WEIGHT - 1) * self.load_s


def estimate(worker: WorkerState, task: WaitingTask, now_s: float, *, ahead_s: float | None = None) -> Estimate:
    """`ahead_s`: the work before the task, if it has its position already; else it comes behind all that is planned."""
    kind = task.kind
    fetch_s, fetch_bytes = 0.0, 0
    if not kind.models <= worker.view.held:
        fetch_s, fetch_bytes = fetching(worker, kind, now_s)
    return Estimate(
        slot_s=worker.wait_s(now_s) if ahead_s is None else ahead_s,
        fetch_s=fetch_s,
        fetch_bytes=fetch_bytes,
        load_s=_next_load_s(worker, task),
        patch_s=_patch_s(worker, task, is_next=ahead_s == 0.0),
        run_s=worker.run_s(task),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BestWorker:
    """Of some workers: the one with the least cost, and the least cost if all of them held the small models."""

    worker: WorkerState
    cost_s: float
    plain_s: float


def best_of(workers: Iterable[WorkerState], task: WaitingTask, now_s: float) -> BestWorker | None:
    """The least `estimate(...).cost_s` of all workers, computed inline for speed; of equal ones the lesser id."""
    kind, steps = task.kind, task.steps
    checkpoint, models = kind.checkpoint, kind.models
    which = kind.family, kind.size_class
    patch_s, combination = PATCH_S * len(kind.loras), kind.combination
    best: WorkerState | None = None
    best_s = plain_best_s = float("inf")
    for worker in workers:
        view = worker.view
        wait_s = worker.wait_s(now_s)
        work_s = view.task_s
        if steps:
            step_s = worker.step_times.get(which)
            work_s += steps * (worker.step_s_of(which) if step_s is None else step_s)
        if checkpoint and checkpoint not in view.vram and checkpoint not in worker.planned_checkpoints:
            work_s += LOAD_WEIGHT * load_s(worker, checkpoint)
        cost_s = wait_s + work_s
        if cost_s < plain_best_s:
            plain_best_s = cost_s
        if cost_s > best_s:
            continue
        if patch_s and (worker.planned or worker.combination != combination):
            work_s += patch_s
            cost_s = wait_s + work_s
        if not models <= view.held:
            cost_s = max(wait_s, fetching(worker, kind, now_s)[0]) + work_s
        if best is None or cost_s < best_s or (cost_s == best_s and view.id < best.view.id):
            best, best_s = worker, cost_s
    return BestWorker(worker=best, cost_s=best_s, plain_s=plain_best_s) if best else None


def fetching(worker: WorkerState, kind: TaskKind, now_s: float) -> tuple[float, int]:
    """Seconds until the missing models are on its disk, and how many bytes of them are still to come."""
    ready_s, new_bytes, coming_bytes, is_sticky = now_s, 0, 0.0, False
    for model in worker.view.lacks(kind.models):
        fetch = worker.fetches.get(model)
        if fetch is not None:
            ready_s = max(ready_s, fetch.ready_s)
            coming_bytes += fetch.left_bytes(now_s)
            continue
        new_bytes += worker.view.size_of(model)
        is_sticky = is_sticky or model == kind.checkpoint
    if new_bytes:
        free_s = worker.link_free_s(now_s, sticky=is_sticky)
        ready_s = max(ready_s, free_s + new_bytes * 8 / worker.view.link_bps)
    return ready_s - now_s, new_bytes + int(coming_bytes)


def load_s(worker: WorkerState, checkpoint: str) -> float:
    """From where the checkpoint is, or will be, to the device."""
    view = worker.view
    if not checkpoint or checkpoint in view.vram:
        return 0.0
    size_bytes = view.size_of(checkpoint)
    bus_s = size_bytes / BUS_BYTES_PER_S
    return bus_s if checkpoint in view.ram else bus_s + size_bytes / DISK_BYTES_PER_S


def _next_load_s(worker: WorkerState, task: WaitingTask) -> float:
    """Nothing where other tasks of its checkpoint are planned: they run together and share one load."""
    others = worker.planned_checkpoints.get(task.kind.checkpoint, 0) - (task.key in worker.planned)
    return 0.0 if others > 0 else load_s(worker, task.kind.checkpoint)


def _patch_s(worker: WorkerState, task: WaitingTask, *, is_next: bool) -> float:
    """Nothing where it comes straight after a task with the same LoRAs in the same checkpoint."""
    follows = is_next or len(worker.planned) == (task.key in worker.planned)
    if follows and worker.combination == task.kind.combination:
        return 0.0
    return PATCH_S * len(task.kind.loras)
