"""The workers by what they offer, take and hold, so that nobody looks at all of them."""

from collections import Counter, deque
from collections.abc import Iterator

from services.gateway.ordering.posts import Crowd, Post
from services.gateway.ordering.tasks import Amounts, Kind, WorkerView, can_do

# Those that hold a task's small models too are looked at first, up to this many.
LOOK_SMALL = 64
# For how many kinds of tasks it is kept at hand which crowds can do them.
ABLE_LIMIT = 4_096
CHECKPOINT = "checkpoint:"

# Stage, offers and limits.
_Which = tuple[str, frozenset[str], Amounts]


class _Alike(Crowd):
    """Workers of a stage that offer exactly the same and have the same limits: most fleets have few such crowds."""

    __slots__ = ("_checkpoints", "limits", "offers", "stage")

    def __init__(self, which: _Which) -> None:
        super().__init__()
        self.stage, self.offers, self.limits = which
        # What they offer, turned on as it is looked through.
        self._checkpoints: deque[str] | None = None

    def can_do(self, kind: Kind) -> bool:
        return self.stage == kind.stage and can_do(self.offers, self.limits, kind.needs, kind.amounts)

    def next_checkpoints(self, count: int) -> list[str]:
        """Others with every call."""
        if self._checkpoints is None:
            names = sorted(need for need in self.offers if need.startswith(CHECKPOINT))
            self._checkpoints = deque(need.removeprefix(CHECKPOINT) for need in names)
        looked = [self._checkpoints[i] for i in range(min(count, len(self._checkpoints)))]
        self._checkpoints.rotate(-len(looked))
        return looked


class Crowds:
    def __init__(self) -> None:
        self.posts: dict[str, Post] = {}
        self.slots = 0
        self._alike: dict[_Which, _Alike] = {}
        # How many of them each stage has.
        self._groups_of: Counter[str] = Counter()
        # By worker, the one of these that it is in.
        self._of: dict[str, _Alike] = {}
        self._able: dict[tuple[str, frozenset[str], Amounts], dict[Crowd, None]] = {}
        # Counts the looks at crowds that were too many.
        self._turn = 0
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
        if _which(before) != _which(view):
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
        which = _which(post.view)
        alike = self._alike.get(which)
        if alike is None:
            alike = self._alike[which] = _Alike(which)
            self._groups_of[alike.stage] += 1
            self._able.clear()
        alike.add(post)
        self._of[post.view.id] = alike

    def _leave(self, post: Post) -> None:
        alike = self._of.pop(post.view.id)
        alike.remove(post.view.id)
        if not alike:
            del self._alike[alike.stage, alike.offers, alike.limits]
            self._groups_of[alike.stage] -= 1
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

    def able(self, kind: Kind) -> dict[Crowd, None]:
        """Crowds of those that offer all that the kind needs, held or not, and take as much as it needs; in order."""
        which = (kind.stage, kind.needs, kind.amounts)
        able = self._able.get(which)
        if able is None:
            if len(self._able) >= ABLE_LIMIT:
                del self._able[next(iter(self._able))]
            able = self._able[which] = {alike: None for alike in self._alike.values() if alike.can_do(kind)}
        return able

    def some_able(self, kind: Kind, count: int) -> Iterator[Post]:
        """Some of those that can do it: as many from each crowd, at least one from each of `count` crowds."""
        able = list(self.able(kind))
        if len(able) > count:
            start = self._turn % len(able)
            self._turn += count
            able = [able[(start + i) % len(able)] for i in range(count)]
        for crowd in able:
            yield from crowd.some(max(1, count // len(able)))

    def like(self, post: Post) -> Crowd:
        """Those that offer exactly what it offers."""
        return self._of[post.view.id]

    def next_unheld(self, post: Post, count: int) -> list[str]:
        """Of the next checkpoints that it offers, those that nobody holds; others with every call."""
        offered = self._of[post.view.id].next_checkpoints(count)
        return [model for model in offered if model not in self._holders]

    def nodes_of(self, kind: Kind) -> frozenset[str]:
        """All nodes that could do it. Linear in them: asked only for what has failed somewhere."""
        return frozenset(post.view.node for crowd in self.able(kind) for post in crowd)

    def near(self, kind: Kind, count: int) -> list[Post]:
        """Some of those that can do it and need not fetch its checkpoint: those with its small models in front."""
        if not kind.checkpoint:
            return list(self.some_able(kind, count))
        able, holding = self.able(kind), self._holding(kind, count)
        if len(able) == self._groups_of[kind.stage]:
            return holding
        return [post for post in holding if self._of[post.view.id] in able]

    def _holding(self, kind: Kind, count: int) -> list[Post]:
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


def _which(view: WorkerView) -> _Which:
    return view.stage, view.offers, view.limits
