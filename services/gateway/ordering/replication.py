"""When one more worker should hold a model, and which. Placing tasks does not wait for it.

Every task tells by how much the best worker that holds its model misses the worker that would be best if all held it:
by waiting behind others, by being slower, by being the only one and therefore perhaps gone. What a model's tasks have
lost so is owed to it and fades; once it is worth more than a download, one more worker fetches the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from services.gateway.ordering.crowds import Crowds
from services.gateway.ordering.posts import Post
from services.gateway.ordering.tasks import USUAL_SIZE_CLASS, Waiting

# How many workers are compared.
LOOK = 48
# Of how many models it is known what is owed to them.
MODELS_LIMIT = 10_000
# One more holder of a model at a time.
REST_S = 2.0
# How many offered checkpoints an idle worker looks through at a time.
LOOK_UNASKED = 32
# Nothing is fetched unasked where fewer workers offer the same: on one machine, or a few, it would hardly pay.
UNASKED_WORKERS_MIN = 8
# What a worker is judged by that is to hold a checkpoint alone: this work at the usual size, with this much to fetch.
UNASKED_STEPS = 20
UNASKED_BYTES = 150 * 10**6
# Checkpoints on their way to one worker at a time.
CHECKPOINTS_LIMIT = 2
# So long a worker is not asked again for what it could not fetch, unless a task needs it.
FAILED_S = 1_800.0
# What a worker may be told to fetch ahead in a day.
DAY_BYTES = 500 * 10**9
DAY_S = 86_400.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    # Seconds lost that outweigh a second of downloading the last of very many copies; checkpoints and small models.
    price: float = 12.0
    small_price: float = 3.0
    # What is owed fades by half in this time.
    half_life_s: float = 1_800.0
    # A worker is gone for so much of the time.
    absence: float = 0.07
    # Seconds of download that a second less for each picture is worth: it is for many pictures, or for one that waits.
    run_weight: float = 80.0
    needed_run_weight: float = 3.0
    # Of its disk a worker fills so much with checkpoints that nobody has asked for yet; 0 turns that off.
    unasked_share: float = 0.3
    day_bytes: int = DAY_BYTES


class Replication:
    def __init__(self, terms: Terms | None = None) -> None:
        self.terms = terms or Terms()
        # By model: seconds owed, and as of when.
        self._owed: dict[str, tuple[float, float]] = {}
        self._settled_s: dict[str, float] = {}

    def owe(self, model: str, lost_s: float, copies: int, download_s: float, now_s: float) -> float:
        """What is owed to the model now, in parts of its download."""
        terms = self.terms
        lost_s = max(0.0, lost_s) + terms.absence ** max(1, copies) * download_s
        before_s, as_of_s = self._owed.get(model, (0.0, now_s))
        owed_s: float = before_s * 0.5 ** ((now_s - as_of_s) / terms.half_life_s) + lost_s
        _remember(self._owed, model, (owed_s, now_s))
        return owed_s / download_s

    def settle(self, model: str, now_s: float) -> None:
        """It is being fetched, here or by another gateway; or nobody could fetch it now."""
        _remember(self._owed, model, (0.0, now_s))
        _remember(self._settled_s, model, now_s)

    def rests(self, model: str, now_s: float) -> bool:
        """It was settled a moment ago."""
        return now_s - self._settled_s.get(model, -REST_S) < REST_S

    def target(self, crowds: Crowds, task: Waiting, now_s: float, *, needed: bool) -> Post | None:
        """Who should fetch the task's checkpoint; `needed`: nobody holds it, so it is no luxury."""
        checkpoint = task.kind.checkpoint
        best, best_s = None, float("inf")
        for post in crowds.some_able(task.kind, LOOK):
            if checkpoint in post.view.held or checkpoint in post.fetches:
                continue
            cost_s = self._cost_s(post, task, now_s, needed=needed)
            if cost_s < best_s and self._may(post, task, now_s, needed=needed):
                best, best_s = post, cost_s
        return best

    def _may(self, post: Post, task: Waiting, now_s: float, *, needed: bool) -> bool:
        if post.view.node in task.failed_nodes:
            return False
        if needed:
            return True
        if _has_failed(post, task.kind.checkpoint, now_s):
            return False
        if not post.view.takes_fetches or sum(fetch.sticky for fetch in post.fetches.values()) >= CHECKPOINTS_LIMIT:
            return False
        return self.has_budget(post, task.kind.checkpoint, now_s)

    def has_budget(self, post: Post, model: str, now_s: float) -> bool:
        """It may fetch that much more ahead today."""
        if now_s - post.since_s >= DAY_S:
            post.since_s, post.fetched_bytes = now_s, 0
        return post.fetched_bytes + post.view.size_of(model) <= self.terms.day_bytes

    def unasked(self, crowds: Crowds, post: Post, now_s: float) -> str:
        """A checkpoint that no worker holds, for a worker whose link is idle; empty where there is none, or no room.

        For the quicker half of a fleet: whoever asks for it first has no other worker to go to.
        """
        room_bytes = post.view.disk_bytes * self.terms.unasked_share
        if not room_bytes or post.fetches or not post.view.takes_fetches:
            return ""
        room_bytes -= sum(post.view.size_of(model) for model in post.view.held)
        if room_bytes <= 0 or not self._is_quick(post, crowds.like(post).some(LOOK)):
            return ""
        for model in crowds.next_unheld(post, LOOK_UNASKED):
            size_bytes = post.view.size_of(model)
            is_new = not _has_failed(post, model, now_s)
            if is_new and 0 < size_bytes <= room_bytes and self.has_budget(post, model, now_s):
                return model
        return ""

    def _is_quick(self, post: Post, others: Sequence[Post]) -> bool:
        limit_s = _unasked_cost_s(post)
        slower = sum(_unasked_cost_s(other) >= limit_s for other in others)
        return len(others) >= UNASKED_WORKERS_MIN and 2 * slower >= len(others)

    def _cost_s(self, post: Post, task: Waiting, now_s: float, *, needed: bool) -> float:
        size_bytes = post.view.size_of(task.kind.checkpoint)
        ready_s = post.link_free_s(now_s, sticky=True) - now_s + size_bytes * 8 / post.view.link_bps
        weight = self.terms.needed_run_weight if needed else self.terms.run_weight
        return max(ready_s, post.wait_s(now_s)) + weight * post.run_s(task)

    def small_target(self, crowds: Crowds, task: Waiting, model: str, now_s: float) -> Post | None:
        """Of those that hold the task's checkpoint, who should fetch one of its small models too."""
        best, best_s = None, float("inf")
        for post in crowds.holders(task.kind.checkpoint).some(LOOK):
            if model in post.fetches or model not in post.view.lacks(frozenset({model})):
                continue
            if _has_failed(post, model, now_s):
                continue
            if (
                post.view.node in task.failed_nodes
                or not post.view.takes_fetches
                or len(post.fetches) > CHECKPOINTS_LIMIT
            ):
                continue
            if not post.view.can_do(task.kind) or task.kind.checkpoint not in post.view.held:
                continue
            cost_s = post.wait_s(now_s) + post.view.size_of(model) * 8 / post.view.link_bps
            cost_s += self.terms.run_weight * post.run_s(task)
            if cost_s < best_s:
                best, best_s = post, cost_s
        return best


def _remember(kept: dict[str, T], model: str, value: T) -> None:
    """Clients name models as they like: those that nobody asked for longest are forgotten."""
    kept.pop(model, None)
    kept[model] = value
    if len(kept) > MODELS_LIMIT:
        del kept[next(iter(kept))]


def _has_failed(post: Post, model: str, now_s: float) -> bool:
    """It could not fetch it a while ago."""
    return now_s - post.failed.get(model, -FAILED_S) < FAILED_S


def _unasked_cost_s(post: Post) -> float:
    return UNASKED_STEPS * post.step_s_of(("", USUAL_SIZE_CLASS)) + UNASKED_BYTES * 8 / post.view.link_bps
