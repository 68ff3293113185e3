"""The plan, and what workers get when they ask: what is planned for them, or what they would finish clearly sooner.

Asking costs a few tasks of each line that the worker could serve.
"""

from collections.abc import Iterator

from services.gateway.ordering import estimate
from services.gateway.ordering.lines import LineId, line_of
from services.gateway.ordering.plan import Plan
from services.gateway.ordering.posts import Post
from services.gateway.ordering.tasks import Fetch, Key, Waiting

# How many of its planned tasks that can begin a worker chooses from.
LOOK_OWN = 8
# An idle worker looks at so many lines, those whose first task came first, and at so many tasks of each.
LOOK_LINES, LOOK_TASKS = 8, 3
# How many it looks at where it can do none of those.
LOOK_LINE = 64
# How many of a line may join a batch.
LOOK_BATCH = 64
# How many tasks that no worker could do are tried again whenever one asks.
LOOK_UNPLACED = 4
# A plan is changed for no less than this.
GAIN_MIN_S = 0.5
# Fetching anew for a task that is planned elsewhere must save this part of the time that it takes.
FETCH_GAIN = 0.5
# A held checkpoint may go first until another task has waited this long.
STICKY_LIMIT_S = 30.0
# After this many times its expected duration and these seconds a fetch is believed to have failed.
OVERDUE_FACTOR = 2.0
OVERDUE_S = 20.0


class Board(Plan):
    def choose(self, worker: str, limit: int, now_s: float) -> list[Waiting]:
        """At most `limit` tasks of one kind for the asker, the best first; a task that must run alone comes alone.

        What is planned for it, or what it would finish clearly sooner than the worker that it is planned for.
        """
        post = self.crowds.posts.get(worker)
        if post is None or limit <= 0:
            return []
        self._give_up_overdue(post, now_s)
        self._begin_waiting(post, now_s)
        self._place_some(LOOK_UNPLACED, now_s)
        head = self._own(post, now_s) or self._other(post, now_s)
        if head is None:
            unasked = self.replication.unasked(self.crowds, post, now_s)
            if unasked:
                self._fetch_checkpoint(post, unasked, now_s)
            return []
        if head.alone:
            return [head]
        return [head, *self._company(post, head, limit - 1, now_s)]

    def _own(self, post: Post, now_s: float) -> Waiting | None:
        """The first of what is planned for it and can begin; rather one whose checkpoint is on the device."""
        ready: list[Waiting] = []
        for task in post.in_order():
            if self._is_ready(post, task):
                ready.append(task)
                if len(ready) == LOOK_OWN:
                    break
        return min(ready, key=lambda task: self._rank_s(post, task, now_s), default=None)

    def _rank_s(self, post: Post, task: Waiting, now_s: float) -> tuple[float, Key]:
        overdue = now_s - task.queue_time_s >= STICKY_LIMIT_S
        penalty_s = 0.0 if overdue else min(STICKY_LIMIT_S, 4 * estimate.load_s(post, task.kind.checkpoint))
        return task.rank_s + penalty_s, task.key

    def _is_ready(self, post: Post, task: Waiting) -> bool:
        """All is on its disk; or it fetches only what it runs; or fetching ahead failed: let it try, and say why."""
        if task.kind.models <= post.view.held or not post.view.takes_fetches:
            return True
        return post.failed.keys() >= set(post.view.lacks(task.kind.models))

    def _give_up_overdue(self, post: Post, now_s: float) -> None:
        for fetch in list(post.fetches.values()):
            if now_s > fetch.ready_s + OVERDUE_FACTOR * (fetch.ready_s - fetch.start_s) + OVERDUE_S:
                self._give_up(post, fetch.model, now_s)

    def _other(self, post: Post, now_s: float) -> Waiting | None:
        """The first of what gains by coming here. Where all of that lacks something, its first is planned here."""
        ready: list[Waiting] = []
        later: list[Waiting] = []
        for which in self.lines.oldest(post.view.stage, post.view.held, LOOK_LINES):
            for task in self._first_for(post, which):
                if self._gain_s(post, task, now_s) > GAIN_MIN_S:
                    is_here = task.kind.models <= post.view.held or not post.view.takes_fetches
                    (ready if is_here else later).append(task)
        chosen = min(ready or later, key=lambda task: (task.rank_s, task.key), default=None)
        if chosen is None:
            return None
        self._unplan(chosen)
        self._plan_at(post, chosen, now_s)
        return chosen if ready else None

    def _first_for(self, post: Post, which: LineId) -> list[Waiting]:
        """The first of a line; where it can do none of those, the first that it can do: large images hide no small."""
        first = self.lines.first(which, LOOK_TASKS)
        if any(post.view.can_do(task.kind) for task in first):
            return first
        more = self.lines.first(which, LOOK_LINE)[LOOK_TASKS:]
        return [task for task in more if post.view.can_do(task.kind)][:LOOK_TASKS]

    def _gain_s(self, post: Post, task: Waiting, now_s: float, *, ahead_s: float = 0.0) -> float:
        """How much sooner the asker, idle, would finish it than the worker it is planned for; less the fetching."""
        if not post.view.can_do(task.kind):
            return 0.0
        other = self._plan.get(task.key)
        if other is post:
            return 0.0
        if post.view.node in task.failed_nodes and not self.crowds.nodes_of(task.kind) <= task.failed_nodes:
            return 0.0
        if not self._has_room(post, task):
            return 0.0
        here = estimate.estimate(post, task, now_s, ahead_s=ahead_s)
        if other is None:
            return float("inf")
        there = estimate.estimate(other, task, now_s, ahead_s=other.ahead_s(task, now_s))
        # A plan that is late is believed less and less.
        late_s = max(0.0, now_s - self._due_s[task.key])
        return there.finish_s + late_s - here.finish_s - FETCH_GAIN * here.fetch_s

    def _company(self, post: Post, head: Waiting, limit: int, now_s: float) -> Iterator[Waiting]:
        """Tasks for the same batch: planned here too, or not begun sooner elsewhere."""
        found, each_s = 0, post.run_s(head) / post.view.slots
        for task in self.lines.first(line_of(head.kind), LOOK_BATCH):
            if found == limit:
                return
            if task.key == head.key or task.kind != head.kind or task.alone:
                continue
            is_ours = self._plan.get(task.key) is post
            if is_ours or self._gain_s(post, task, now_s, ahead_s=(found + 1) * each_s) > GAIN_MIN_S:
                found += 1
                yield task

    # Fetching

    def fetches(self, worker: str, *, told: bool = True) -> list[Fetch]:
        """What a worker should fetch meanwhile, the most urgent first."""
        post = self.crowds.posts.get(worker)
        if post is None:
            return []
        wanted = post.wanted()
        if told:
            post.told = tuple(fetch.model for fetch in wanted)
        return wanted

    def has_news(self, worker: str) -> bool:
        """What the worker should fetch is other than what it was told."""
        post = self.crowds.posts.get(worker)
        return post is not None and any(model not in post.told for model in post.fetches)
