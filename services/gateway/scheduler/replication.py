"""Prefetch and replication: which models workers prefetch, and when one more worker should hold a model.

A task's delay beyond the ideal placement, where all workers hold its model, is added to the model's replication score
(seconds). The score decays with a half-life of 30 minutes. Once it exceeds `price` x download time, one more replica
is fetched and the score starts again at 0. Placing tasks does not wait for it. Pure: a few workers are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from services.gateway.scheduler.avoidance import all_avoid
from services.gateway.scheduler.estimate import BestWorker
from services.gateway.scheduler.pace import USUAL_SIZE_CLASS
from services.gateway.scheduler.queue import WaitingTask
from services.gateway.scheduler.workers import PlannedFetch, WorkerIndex, WorkerState

# How many workers are compared.
LOOK = 48
# For how many models a score is kept.
MODELS_LIMIT = 10_000
# After one replica of a model is begun, the next one waits this long.
REST_S = 2.0
# How many offered checkpoints an idle worker looks through at a time for a speculative prefetch.
LOOK_SPECULATIVE = 32
# Nothing is fetched speculatively where fewer workers offer the same: with only a few workers it would hardly pay.
SPECULATIVE_WORKERS_MIN = 8
# The work by which workers are compared for a speculative prefetch: evaluations at the usual size, and bytes to fetch.
SPECULATIVE_STEPS = 20
SPECULATIVE_BYTES = 150 * 10**6
# Checkpoints on their way to one worker at a time.
CHECKPOINTS_LIMIT = 2
# Small models on their way to one worker at a time.
FETCHES_LIMIT = 8
# A worker that failed to fetch a model is not asked for it again for this long, unless a task needs it.
FAILED_S = 1_800.0
# How much a worker may be asked to prefetch in a day.
DAY_BYTES = 500 * 10**9
DAY_S = 86_400.0
# A further replica helps the less the more there are: at this many its price is half of what it is at very many.
REPLICAS_HALF = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicationPolicy:
    # Score, in download times of the model, above which the last of very many replicas is fetched; for checkpoints,
    # and for small models.
    price: float = 12.0
    small_price: float = 3.0
    # The replication score halves in this time.
    half_life_s: float = 1_800.0
    # A worker is away for this share of the time.
    absence: float = 0.07
    # How many seconds of extra download we accept to save one second of run time per image: for a further replica,
    # which serves many images, and for the first one, which one waiting task needs.
    run_weight: float = 80.0
    needed_run_weight: float = 3.0
    # Fraction of an idle worker's disk used for speculative prefetch of checkpoints with no replica; 0 turns it off.
    speculative_share: float = 0.3
    day_bytes: int = DAY_BYTES


class Replication:
    """The models' replication scores, and which worker should hold the next replica."""

    def __init__(self, policy: ReplicationPolicy | None = None) -> None:
        self.policy = policy or ReplicationPolicy()
        # By model: its score in seconds, and as of when.
        self._scores: dict[str, tuple[float, float]] = {}
        self._reset_s: dict[str, float] = {}

    def add_loss(self, model: str, lost_s: float, replicas: int, download_s: float, now_s: float) -> float:
        """Add a task's delay to the model's score; the new score in download times.

        The chance that all replicas are away at once counts too, as a delay of one download.
        """
        policy = self.policy
        lost_s = max(0.0, lost_s) + policy.absence ** max(1, replicas) * download_s
        before_s, as_of_s = self._scores.get(model, (0.0, now_s))
        score_s: float = before_s * 0.5 ** ((now_s - as_of_s) / policy.half_life_s) + lost_s
        _remember(self._scores, model, (score_s, now_s))
        return score_s / download_s

    def reset(self, model: str, now_s: float) -> None:
        """A replica is being fetched, here or by another gateway; or no worker could fetch it now."""
        _remember(self._scores, model, (0.0, now_s))
        _remember(self._reset_s, model, now_s)

    def is_resting(self, model: str, now_s: float) -> bool:
        """Its score was reset a moment ago."""
        return now_s - self._reset_s.get(model, -REST_S) < REST_S

    def checkpoint_target(
        self, index: WorkerIndex, task: WaitingTask, now_s: float, *, needed: bool
    ) -> WorkerState | None:
        """The worker that should fetch the task's checkpoint; `needed`: it has no replica, so the task waits for it."""
        checkpoint = task.kind.checkpoint
        best, best_s = None, float("inf")
        is_retry = needed and all_avoid(index, task)
        for worker in index.sample_able(task.kind, LOOK):
            if checkpoint in worker.view.held or checkpoint in worker.fetches:
                continue
            cost_s = self._cost_s(worker, task, now_s, needed=needed)
            if cost_s < best_s and (is_retry or self._may(worker, task, now_s, needed=needed)):
                best, best_s = worker, cost_s
        return best

    def _may(self, worker: WorkerState, task: WaitingTask, now_s: float, *, needed: bool) -> bool:
        if worker.view.avoids(task):
            return False
        if needed:
            return True
        if _has_failed(worker, task.kind.checkpoint, now_s):
            return False
        coming = sum(fetch.sticky for fetch in worker.fetches.values())
        if not worker.view.takes_fetches or coming >= CHECKPOINTS_LIMIT:
            return False
        return self.has_budget(worker, task.kind.checkpoint, now_s)

    def has_budget(self, worker: WorkerState, model: str, now_s: float) -> bool:
        """It may fetch that much more ahead today."""
        if now_s - worker.since_s >= DAY_S:
            worker.since_s, worker.fetched_bytes = now_s, 0
        return worker.fetched_bytes + worker.view.size_of(model) <= self.policy.day_bytes

    def speculative(self, index: WorkerIndex, worker: WorkerState, now_s: float) -> str:
        """A checkpoint with no replica, for a worker whose link is idle; empty for no such checkpoint, or no disk left.

        Only for the faster half of a fleet: the first task of the checkpoint will have no other worker to go to.
        """
        free_bytes = worker.view.disk_bytes * self.policy.speculative_share
        if not free_bytes or worker.fetches or not worker.view.takes_fetches:
            return ""
        free_bytes -= sum(worker.view.size_of(model) for model in worker.view.held)
        if free_bytes <= 0 or not self._is_fast(worker, index.like(worker).sample(LOOK)):
            return ""
        for model in index.next_unheld(worker, LOOK_SPECULATIVE):
            size_bytes = worker.view.size_of(model)
            is_new = not _has_failed(worker, model, now_s)
            if is_new and 0 < size_bytes <= free_bytes and self.has_budget(worker, model, now_s):
                return model
        return ""

    def _is_fast(self, worker: WorkerState, others: Sequence[WorkerState]) -> bool:
        limit_s = _speculative_cost_s(worker)
        slower = sum(_speculative_cost_s(other) >= limit_s for other in others)
        return len(others) >= SPECULATIVE_WORKERS_MIN and 2 * slower >= len(others)

    def _cost_s(self, worker: WorkerState, task: WaitingTask, now_s: float, *, needed: bool) -> float:
        size_bytes = worker.view.size_of(task.kind.checkpoint)
        ready_s = worker.link_free_s(now_s, sticky=True) - now_s + size_bytes * 8 / worker.view.link_bps
        weight = self.policy.needed_run_weight if needed else self.policy.run_weight
        return max(ready_s, worker.wait_s(now_s)) + weight * worker.run_s(task)

    def small_model_target(self, index: WorkerIndex, task: WaitingTask, model: str, now_s: float) -> WorkerState | None:
        """Of the workers that hold the task's checkpoint, the one that should fetch one of its small models too."""
        best, best_s = None, float("inf")
        for worker in index.holders(task.kind.stage, task.kind.checkpoint).sample(LOOK):
            if not _may_fetch_small(worker, task, model, now_s):
                continue
            cost_s = worker.wait_s(now_s) + worker.view.size_of(model) * 8 / worker.view.link_bps
            cost_s += self.policy.run_weight * worker.run_s(task)
            if cost_s < best_s:
                best, best_s = worker, cost_s
        return best


def _may_fetch_small(worker: WorkerState, task: WaitingTask, model: str, now_s: float) -> bool:
    view = worker.view
    if model in worker.fetches or model not in view.lacks(frozenset({model})) or _has_failed(worker, model, now_s):
        return False
    if view.avoids(task) or not view.takes_fetches or len(worker.fetches) > CHECKPOINTS_LIMIT:
        return False
    return view.can_do(task.kind) and task.kind.checkpoint in view.held


def _remember(values: dict[str, T], model: str, value: T) -> None:
    """Clients choose models' names: beyond the limit the least recently used is evicted."""
    values.pop(model, None)
    values[model] = value
    if len(values) > MODELS_LIMIT:
        del values[next(iter(values))]


def _has_failed(worker: WorkerState, model: str, now_s: float) -> bool:
    """It failed to fetch the model a while ago."""
    return now_s - worker.failed.get(model, -FAILED_S) < FAILED_S


def _speculative_cost_s(worker: WorkerState) -> float:
    step_s = worker.step_s_of(("", USUAL_SIZE_CLASS))
    return SPECULATIVE_STEPS * step_s + SPECULATIVE_BYTES * 8 / worker.view.link_bps


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One more worker should hold a checkpoint. Only one gateway may have it fetched."""

    worker: str
    fetch: PlannedFetch


class PrefetchPlanner:
    """Plans what workers prefetch: what their planned tasks lack, and further replicas.

    `changed` collects the ids of workers that should ask again.
    """

    def __init__(self, index: WorkerIndex, replication: Replication, changed: set[str]) -> None:
        self._index = index
        self._replication = replication
        self._changed = changed
        # Checkpoints to claim, since the last `pop_claims`.
        self._claims: list[Claim] = []

    def pop_claims(self) -> list[Claim]:
        claims, self._claims = self._claims, []
        return claims

    def begin(self, worker: WorkerState, model: str, now_s: float, *, sticky: bool) -> PlannedFetch:
        size_bytes = worker.view.size_of(model)
        free_s = worker.link_free_s(now_s, sticky=sticky)
        ready_s = free_s + size_bytes * 8 / worker.view.link_bps
        fetch = PlannedFetch(model=model, size_bytes=size_bytes, start_s=now_s, ready_s=ready_s, sticky=sticky)
        worker.begin(fetch, now_s)
        self._changed.add(worker.view.id)
        self._index.expect(worker, model)
        return fetch

    def drop(self, worker: WorkerState, model: str, now_s: float) -> None:
        """The worker will not have it, and is not asked again for a while."""
        del worker.fetches[model]
        self._index.drop(worker, model)
        worker.failed[model] = now_s

    def has_slot(self, worker: WorkerState, task: WaitingTask) -> bool:
        """One more fetch may begin, or all that the task lacks is on its way."""
        return len(worker.fetches) < FETCHES_LIMIT or worker.fetches.keys() >= task.kind.models - worker.view.held

    def begin_small_models(self, worker: WorkerState, task: WaitingTask, now_s: float) -> None:
        """Prefetch what the task needs besides its checkpoint, up to the limit of fetches at a time."""
        if not worker.view.takes_fetches or task.kind.models <= worker.view.held:
            return
        for model in worker.view.lacks(task.kind.models):
            is_new = model not in worker.fetches and model not in worker.failed and model != task.kind.checkpoint
            if is_new and len(worker.fetches) < FETCHES_LIMIT:
                self.begin(worker, model, now_s, sticky=False)

    def begin_speculative(self, worker: WorkerState, now_s: float) -> None:
        """Where the worker is idle, prefetch a checkpoint with no replica."""
        checkpoint = self._replication.speculative(self._index, worker, now_s)
        if checkpoint:
            self._begin_checkpoint(worker, checkpoint, now_s)

    def first_replica(self, task: WaitingTask, now_s: float) -> WorkerState | None:
        """The worker that fetches the task's checkpoint, which has no replica; None where no worker can."""
        checkpoint = task.kind.checkpoint
        if not checkpoint:
            return None
        worker = self._replication.checkpoint_target(self._index, task, now_s, needed=True)
        if worker is not None and worker.view.lacks(frozenset({checkpoint})):
            self._begin_checkpoint(worker, checkpoint, now_s)
        return worker

    def consider_replicas(self, task: WaitingTask, best: BestWorker, now_s: float) -> None:
        """Begin one more replica of the task's checkpoint, or of a small model, if its score is high enough.

        The task stays where it is.
        """
        worker, checkpoint = best.worker, task.kind.checkpoint
        if worker.view.size_of(checkpoint) and not self._replication.is_resting(checkpoint, now_s):
            lost_s = best.plain_s - self._ideal_s(task, now_s)
            if self._is_worth(worker, checkpoint, lost_s, self._replication.policy.price, now_s):
                target = self._replication.checkpoint_target(self._index, task, now_s, needed=False)
                if target is not None:
                    self._begin_checkpoint(target, checkpoint, now_s)
        for model in task.kind.models:
            if model != checkpoint and worker.view.size_of(model) and not self._replication.is_resting(model, now_s):
                self._consider_small(task, best, model, now_s)

    def _consider_small(self, task: WaitingTask, best: BestWorker, model: str, now_s: float) -> None:
        lost_s = best.cost_s - best.plain_s
        if self._is_worth(best.worker, model, lost_s, self._replication.policy.small_price, now_s):
            target = self._replication.small_model_target(self._index, task, model, now_s)
            if target is not None:
                self.begin(target, model, now_s, sticky=False)

    def _is_worth(self, worker: WorkerState, model: str, lost_s: float, price: float, now_s: float) -> bool:
        """If so, the score is reset, even where no worker can fetch the replica now."""
        download_s = worker.view.size_of(model) * 8 / worker.view.link_bps
        replicas = len(self._index.holders(worker.view.stage, model))
        score = self._replication.add_loss(model, lost_s, replicas, download_s, now_s)
        if score <= price * replicas / (replicas + REPLICAS_HALF):
            return False
        self._replication.reset(model, now_s)
        return True

    def _ideal_s(self, task: WaitingTask, now_s: float) -> float:
        """When the best worker would have finished, if all of them held everything."""
        return min(
            (worker.wait_s(now_s) + worker.run_s(task) for worker in self._index.sample_able(task.kind, LOOK)),
            default=float("inf"),
        )

    def _begin_checkpoint(self, worker: WorkerState, checkpoint: str, now_s: float) -> None:
        self._replication.reset(checkpoint, now_s)
        fetch = self.begin(worker, checkpoint, now_s, sticky=True)
        worker.fetched_bytes += fetch.size_bytes
        self._claims.append(Claim(worker=worker.view.id, fetch=fetch))
