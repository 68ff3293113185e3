"""The workers by what they offer and hold, so that nobody looks at all of them."""

from collections import deque
from collections.abc import Iterator

from services.gateway.ordering.posts import Crowd, Post
from services.gateway.ordering.tasks import Kind, WorkerView

# Those that hold a task's small models too are looked at first, up to this many.
LOOK_SMALL = 64
CHECKPOINT = "checkpoint:"


class Crowds:
    def __init__(self) -> None:
        self.posts: dict[str, Post] = {}
        self.slots = 0
        # Workers that offer exactly the same: most fleets have few such crowds.
        self._alike: dict[tuple[str, frozenset[str]], Crowd] = {}
        # What each of them offers, turned on as it is looked through.
        self._checkpoints: dict[tuple[str, frozenset[str]], deque[str]] = {}
        self._able: dict[tuple[str, frozenset[str]], list[Crowd]] = {}
        # By model: those that hold it or are fetching it.
        self._holders: dict[str, Crowd] = {}

    def add(self, post: Post) -> None:
        self.posts[post.view.id] = post
        self.slots += post.view.slots
        self._join(post)
        for model in post.view.held:
            self._hold(post, model)

    def remove(self, post: Post) -> None:
        del self.posts[post.view.id]
        self.slots -= post.view.slots
        self._leave(post)
        for model in post.view.held | post.fetches.keys():
            self._unhold(post, model)

    def revise(self, post: Post, view: WorkerView) -> None:
        before = post.view
        self.slots += view.slots - before.slots
        if (before.stage, before.offers) != (view.stage, view.offers):
            self._leave(post)
            post.revise(view)
            self._join(post)
        else:
            post.revise(view)
        if before.held != view.held:
            for model in view.held - before.held:
                self._hold(post, model)
            for model in before.held - view.held - post.fetches.keys():
                self._unhold(post, model)

    def _join(self, post: Post) -> None:
        which = (post.view.stage, post.view.offers)
        if which not in self._alike:
            self._alike[which] = Crowd()
            self._able.clear()
        self._alike[which].add(post)

    def _leave(self, post: Post) -> None:
        which = (post.view.stage, post.view.offers)
        self._alike[which].remove(post.view.id)
        if not self._alike[which]:
            del self._alike[which]
            self._checkpoints.pop(which, None)
            self._able.clear()

    def _hold(self, post: Post, model: str) -> None:
        self._holders.setdefault(model, Crowd()).add(post)

    def _unhold(self, post: Post, model: str) -> None:
        crowd = self._holders.get(model)
        if crowd is not None:
            crowd.remove(post.view.id)
            if not crowd:
                del self._holders[model]

    def expect(self, post: Post, model: str) -> None:
        """It fetches the model, so it is nearly a holder."""
        self._hold(post, model)

    def drop(self, post: Post, model: str) -> None:
        """It does not fetch the model after all."""
        if model not in post.view.held:
            self._unhold(post, model)

    def __contains__(self, model: str) -> bool:
        """Somebody holds it, or is fetching it."""
        return model in self._holders

    def holders(self, model: str) -> Crowd:
        return self._holders.get(model) or Crowd()

    def able(self, kind: Kind) -> list[Crowd]:
        """Crowds of those that offer all that the kind needs, held or not."""
        which = (kind.stage, kind.needs)
        if which not in self._able:
            self._able[which] = [
                crowd for (stage, offers), crowd in self._alike.items() if stage == kind.stage and kind.needs <= offers
            ]
        return self._able[which]

    def like(self, post: Post) -> Crowd:
        """Those that offer exactly what it offers."""
        return self._alike[post.view.stage, post.view.offers]

    def next_unheld(self, post: Post, count: int) -> list[str]:
        """Of the next checkpoints that it offers, those that nobody holds; others with every call."""
        which = (post.view.stage, post.view.offers)
        offered = self._checkpoints.get(which)
        if offered is None:
            names = sorted(need for need in post.view.offers if need.startswith(CHECKPOINT))
            offered = self._checkpoints[which] = deque(need.removeprefix(CHECKPOINT) for need in names)
        looked = [offered[i] for i in range(min(count, len(offered)))]
        offered.rotate(-len(looked))
        return [model for model in looked if model not in self._holders]

    def nodes_of(self, kind: Kind) -> frozenset[str]:
        """All nodes that could do it. Linear in them: asked only for what has failed somewhere."""
        return frozenset(post.view.node for crowd in self.able(kind) for post in crowd)

    def near(self, kind: Kind, count: int) -> list[Post]:
        """Some of those that need not fetch its checkpoint: those with its small models in front."""
        if not kind.checkpoint:
            return [post for crowd in self.able(kind) for post in crowd.some(count)]
        holders = self._holders.get(kind.checkpoint)
        if holders is None:
            return []
        if len(holders) <= count:
            return holders.some(count)
        small = [post for post in self._small(kind) if post.view.id in holders]
        return small + holders.some(count)

    def _small(self, kind: Kind) -> Iterator[Post]:
        for model in kind.models:
            if model != kind.checkpoint and model in self._holders:
                yield from self._holders[model].some(LOOK_SMALL)
