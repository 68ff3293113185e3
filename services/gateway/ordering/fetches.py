"""What workers fetch ahead: what planned tasks lack, and one more copy of what is missed elsewhere.

Pure: told the time, it decides. The workers that come into question are looked at a few at a time.
"""

from dataclasses import dataclass

from services.gateway.ordering.crowds import Crowds
from services.gateway.ordering.estimate import Best
from services.gateway.ordering.posts import Post
from services.gateway.ordering.replication import Replication
from services.gateway.ordering.tasks import Fetch, Waiting

# How many workers are looked at to see how soon a task could be finished.
LOOK_IDEAL = 48
# A further copy helps the less the more there are: with so many its price is half of what it is with very many.
COPIES_HALF = 4
# How many small models one worker has on their way at a time.
FETCHES_LIMIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One more worker should hold a checkpoint. Only one gateway may have it fetched."""

    worker: str
    fetch: Fetch


class Fetches:
    def __init__(self, replication: Replication | None = None) -> None:
        self.crowds = Crowds()
        self.replication = replication or Replication()
        # Since the last `take`: workers that should ask again, and checkpoints to claim.
        self._stirred: set[str] = set()
        self._claims: list[Claim] = []

    def take_stirred(self) -> set[str]:
        stirred, self._stirred = self._stirred, set()
        return stirred

    def take_claims(self) -> list[Claim]:
        claims, self._claims = self._claims, []
        return claims

    # What planned tasks lack

    def _has_room(self, post: Post, task: Waiting) -> bool:
        return len(post.fetches) < FETCHES_LIMIT or post.fetches.keys() >= task.kind.models - post.view.held

    def _begin_small(self, post: Post, task: Waiting, now_s: float) -> None:
        """Have what the task needs besides its checkpoint fetched ahead, as far as there is room for it."""
        if not post.view.takes_fetches or task.kind.models <= post.view.held:
            return
        for model in post.view.lacks(task.kind.models):
            is_new = model not in post.fetches and model not in post.failed and model != task.kind.checkpoint
            if is_new and len(post.fetches) < FETCHES_LIMIT:
                self._begin(post, model, now_s, sticky=False)
                self.crowds.expect(post, model)

    def _begin(self, post: Post, model: str, now_s: float, *, sticky: bool) -> Fetch:
        size_bytes = post.view.size_of(model)
        free_s = post.link_free_s(now_s, sticky=sticky)
        ready_s = free_s + size_bytes * 8 / post.view.link_bps
        fetch = Fetch(model=model, size_bytes=size_bytes, start_s=now_s, ready_s=ready_s, sticky=sticky)
        post.begin(fetch, now_s)
        self._stirred.add(post.view.id)
        return fetch

    # More holders

    def _first_holder(self, task: Waiting, now_s: float) -> Post | None:
        """Nobody near holds the checkpoint: who should fetch it."""
        checkpoint = task.kind.checkpoint
        if not checkpoint:
            return None
        post = self.replication.target(self.crowds, task, now_s, needed=True)
        if post is not None and post.view.lacks(frozenset({checkpoint})):
            self._fetch_checkpoint(post, checkpoint, now_s)
        return post

    def _consider_more(self, task: Waiting, best: Best, now_s: float) -> None:
        """Have one more worker fetch the checkpoint, or a small model, once that is worth it; the task stays."""
        kind, post = task.kind, best.post
        terms, checkpoint = self.replication.terms, kind.checkpoint
        if post.view.size_of(checkpoint) and not self.replication.rests(checkpoint, now_s):
            lost_s = best.plain_s - self._ideal_s(task, now_s)
            if self._is_worth(post, checkpoint, lost_s, terms.price, now_s):
                more = self.replication.target(self.crowds, task, now_s, needed=False)
                if more is not None:
                    self._fetch_checkpoint(more, checkpoint, now_s)
        for model in kind.models:
            if model != checkpoint and post.view.size_of(model) and not self.replication.rests(model, now_s):
                lost_s = best.cost_s - best.plain_s
                if self._is_worth(post, model, lost_s, terms.small_price, now_s):
                    more = self.replication.small_target(self.crowds, task, model, now_s)
                    if more is not None:
                        self._begin(more, model, now_s, sticky=False)
                        self.crowds.expect(more, model)

    def _is_worth(self, post: Post, model: str, lost_s: float, price: float, now_s: float) -> bool:
        """If so, the account is settled: where nobody can fetch it now, it begins anew."""
        download_s = post.view.size_of(model) * 8 / post.view.link_bps
        copies = len(self.crowds.holders(model))
        if self.replication.owe(model, lost_s, copies, download_s, now_s) <= price * copies / (copies + COPIES_HALF):
            return False
        self.replication.settle(model, now_s)
        return True

    def _ideal_s(self, task: Waiting, now_s: float) -> float:
        """When the best worker would have finished, did all of them hold everything."""
        return min(
            (post.wait_s(now_s) + post.run_s(task) for post in self.crowds.some_able(task.kind, LOOK_IDEAL)),
            default=float("inf"),
        )

    def _fetch_checkpoint(self, post: Post, checkpoint: str, now_s: float) -> None:
        self.replication.settle(checkpoint, now_s)
        fetch = self._begin(post, checkpoint, now_s, sticky=True)
        post.fetched_bytes += fetch.size_bytes
        self.crowds.expect(post, checkpoint)
        self._claims.append(Claim(worker=post.view.id, fetch=fetch))
