"""Where each waiting task is planned: at the worker that should finish it first.

Pure: told the time, it decides; several gateways may each keep one, for a claim is a compare-and-set elsewhere. Placing
a task costs what looking at the holders of its checkpoint costs.
"""

from collections.abc import Sequence
from itertools import islice

from services.gateway.ordering import estimate
from services.gateway.ordering.fetches import FETCHES_LIMIT, Claim, Fetches
from services.gateway.ordering.lines import Lines
from services.gateway.ordering.posts import Post
from services.gateway.ordering.replication import Replication
from services.gateway.ordering.tasks import Key, Waiting, WorkerView

# How many workers are looked at for a place; with more holders each task looks at others. The best of 64 is among the
# first two of a hundred, and looking at more costs every submit more than that wins.
LOOK_WORKERS = 64
# How many tasks that no worker could do are tried again with a new worker.
LOOK_UNPLACED = 64
# How many of a worker's next tasks are looked at when there is room for more fetches.
LOOK_PLANNED = 32


class Plan(Fetches):
    def __init__(self, replication: Replication | None = None) -> None:
        super().__init__(replication)
        self.lines = Lines()
        # Where each waiting task is planned; those in `_unplaced` nowhere.
        self._plan: dict[Key, Post] = {}
        self._unplaced: dict[Key, Waiting] = {}
        self._running: dict[Key, Post] = {}
        # When each planned task should begin.
        self._due_s: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self.lines)

    def __contains__(self, key: Key) -> bool:
        return key in self.lines

    @property
    def workers(self) -> list[str]:
        return list(self.crowds.posts)

    @property
    def slots(self) -> int:
        """Of all workers together."""
        return self.crowds.slots

    def post(self, worker: str) -> Post | None:
        return self.crowds.posts.get(worker)

    def posts_of(self, stage: str) -> list[Post]:
        """All workers of a stage that are counted on."""
        return [post for post in self.crowds.posts.values() if post.view.stage == stage]

    def left_s(self, key: Key, now_s: float) -> float:
        """How long a running task should still take."""
        post = self._running.get(key)
        return max(0.0, post.running[key] - now_s) if post else 0.0

    def would_finish_s(self, task: Waiting, now_s: float) -> float | None:
        """In how many seconds a task that is not offered yet would be done, were it offered now; None: nobody can."""
        best = estimate.best_of(self._candidates(task), task, now_s)
        return estimate.estimate(best.post, task, now_s).finish_s if best else None

    def planned_at(self, key: Key) -> Post | None:
        return self._plan.get(key)

    # Workers

    def seen(self, view: WorkerView, now_s: float) -> None:
        """A worker described itself: it is new, or something may have changed."""
        post = self.crowds.posts.get(view.id)
        if post is None:
            self.crowds.add(Post(view, now_s))
            self._place_some(LOOK_UNPLACED, now_s)
        elif post.view != view:
            self._revise(post, view, now_s)

    def _revise(self, post: Post, view: WorkerView, now_s: float) -> None:
        before = post.view
        self.crowds.revise(post, view)
        for model in [each for each in post.fetches if each in view.held]:
            del post.fetches[model]
        for model in [each for each in post.fetches if each in view.unfetched]:
            self._give_up(post, model, now_s)
        post.failed = {each: since_s for each, since_s in post.failed.items() if each not in view.held}
        self._begin_waiting(post, now_s)
        does_other = (before.offers, before.limits) != (view.offers, view.limits)
        if does_other or not before.held <= view.held:
            lost = [task for task in post.in_order() if not self._stands(post, task)]
            self._place_again(lost, now_s)
        if does_other:
            self._place_some(LOOK_UNPLACED, now_s)

    def _give_up(self, post: Post, model: str, now_s: float) -> None:
        """It will not come: what needs it goes to others that have it, or else may try here, and say why."""
        self._drop_fetch(post, model, now_s)
        self._place_elsewhere(post, model, now_s)

    def _drop_fetch(self, post: Post, model: str, now_s: float) -> None:
        del post.fetches[model]
        self.crowds.drop(post, model)
        post.failed[model] = now_s

    def _place_elsewhere(self, post: Post, model: str, now_s: float) -> None:
        if model in self.crowds:
            self._place_again([task for task in post.in_order() if model in task.kind.models], now_s)

    def _begin_waiting(self, post: Post, now_s: float) -> None:
        """There may be room now for what its next tasks need."""
        for task in islice(post.in_order(), LOOK_PLANNED):
            if len(post.fetches) >= FETCHES_LIMIT:
                return
            self._begin_small(post, task, now_s)

    def _stands(self, post: Post, task: Waiting) -> bool:
        """The worker can still do it without fetching a checkpoint that it lost."""
        checkpoint = task.kind.checkpoint
        if not post.view.can_do(task.kind):
            return False
        return not post.view.lacks(frozenset({checkpoint})) or checkpoint in post.fetches

    def gone(self, worker: str, now_s: float) -> None:
        """It left, or died: what was meant for it goes elsewhere."""
        post = self.crowds.posts.get(worker)
        if post is None:
            return
        self.crowds.remove(post)
        for key in list(post.running):
            self._running.pop(key, None)
        self._place_again(list(post.planned.values()), now_s)

    def asks(self, worker: str, now_s: float) -> None:
        """It holds a poll for work open."""
        post = self.crowds.posts.get(worker)
        if post is not None:
            post.asking += 1
            post.heard_s = now_s

    def answered(self, worker: str, now_s: float) -> None:
        """That poll is over."""
        post = self.crowds.posts.get(worker)
        if post is not None:
            post.asking = max(0, post.asking - 1)
            post.heard_s = now_s

    def heard(self, worker: str, now_s: float) -> None:
        """It is there for work, at another gateway."""
        post = self.crowds.posts.get(worker)
        if post is not None:
            post.heard_s = now_s

    def refuse(self, claim: Claim, holder: str, now_s: float) -> None:
        """Another gateway has that checkpoint fetched already, by `holder`, which may be unknown here."""
        model = claim.fetch.model
        post, other = self.crowds.posts.get(claim.worker), self.crowds.posts.get(holder)
        if post is None or other is post or model not in post.fetches:
            return
        self._drop_fetch(post, model, now_s)
        if other is not None and model not in other.view.held and model not in other.fetches:
            self._begin(other, model, now_s, sticky=True)
            self.crowds.expect(other, model)
        self._place_elsewhere(post, model, now_s)

    # Tasks

    def add(self, task: Waiting, now_s: float) -> None:
        self.remove(task.key)
        self.lines.add(task)
        self._place(task, now_s)

    def remove(self, key: Key) -> None:
        """No error where there is none."""
        task = self.lines.remove(key)
        if task is not None:
            self._unplan(task)

    def _unplan(self, task: Waiting) -> None:
        self._unplaced.pop(task.key, None)
        self._due_s.pop(task.key, None)
        post = self._plan.pop(task.key, None)
        if post is not None:
            post.unplan(task)

    def started(self, worker: str, task: Waiting, now_s: float) -> None:
        """It was leased."""
        post = self.crowds.posts.get(worker)
        if post is None or task.key in self._running:
            return
        needed = estimate.estimate(post, task, now_s, ahead_s=0.0)
        post.run(task.key, now_s + needed.finish_s, now_s)
        post.combination = task.kind.combination
        self._running[task.key] = post

    def ended(self, key: Key, now_s: float, *, heard: bool = True) -> None:
        """Its lease is over, whatever came of it; `heard`: the worker said so, and is there for more."""
        post = self._running.pop(key, None)
        if post is not None:
            post.stop(key, now_s, heard=heard)

    # Placing

    def _place_some(self, count: int, now_s: float) -> None:
        """Try some of those that nobody could do before, others with every call."""
        for task in list(islice(self._unplaced.values(), count)):
            del self._unplaced[task.key]
            self._place(task, now_s)

    def _place_again(self, tasks: Sequence[Waiting], now_s: float) -> None:
        for task in tasks:
            self._unplan(task)
        for task in tasks:
            self._place(task, now_s)

    def _place(self, task: Waiting, now_s: float) -> None:
        best = estimate.best_of(self._candidates(task), task, now_s)
        post = best.post if best else self._first_holder(task, now_s)
        if post is None:
            self._unplaced[task.key] = task
            return
        if best and task.kind.checkpoint:
            self._consider_more(task, best, now_s)
        self._plan_at(post, task, now_s)

    def _plan_at(self, post: Post, task: Waiting, now_s: float) -> None:
        self._unplaced.pop(task.key, None)
        self._begin_small(post, task, now_s)
        needed = estimate.estimate(post, task, now_s)
        self._due_s[task.key] = now_s + needed.start_s
        post.plan(task, needed.load_s + needed.patch_s)
        self._plan[task.key] = post
        self._stirred.add(post.view.id)

    def _candidates(self, task: Waiting) -> list[Post]:
        """Without those that failed it, while there are others."""
        able = self.crowds.near(task.kind, LOOK_WORKERS)
        fresh = [post for post in able if post.view.node not in task.failed_nodes] if task.failed_nodes else able
        if fresh or not able:
            return fresh
        return able if self.crowds.nodes_of(task.kind) <= task.failed_nodes else []
