"""What is planned, running and being fetched at one worker, and crowds of workers to choose from."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import replace

from services.gateway.ordering.evaluations import step_s
from services.gateway.ordering.tasks import Fetch, Key, Kind, Waiting, WorkerView

# For how many families and sizes a worker's step time is kept at hand.
STEP_TIMES_LIMIT = 256
# A free worker that holds no poll open is expected no sooner.
AWAY_S = 1.0


class Post:
    """A worker's place in the plan."""

    __slots__ = (
        "_extra_s",
        "_free_s",
        "_order",
        "_taken_s",
        "_work_s",
        "asking",
        "combination",
        "failed",
        "fetched_bytes",
        "fetches",
        "heard_s",
        "lined",
        "planned",
        "running",
        "since_s",
        "step_times",
        "told",
        "view",
    )

    def __init__(self, view: WorkerView, now_s: float) -> None:
        self.view = view
        # How many polls for work it holds open, and when it was last known to be there for work.
        self.asking = 0
        self.heard_s = now_s
        # Waiting tasks that are meant for it, how many of each checkpoint, and their work in seconds.
        self.planned: dict[Key, Waiting] = {}
        self.lined: dict[str, int] = {}
        self._order: list[tuple[float, Key]] = []
        self._work_s = 0.0
        # What each of them takes besides its work: loading and patching.
        self._extra_s: dict[Key, float] = {}
        # What each of them adds to the work.
        self._taken_s: dict[Key, float] = {}
        # One evaluation by family and size class, as far as it was asked for.
        self.step_times: dict[tuple[str, int], float] = {}
        # Leased tasks, and when each one should end.
        self.running: dict[Key, float] = {}
        self._free_s = 0.0
        # The checkpoint and LoRAs of what it was given last.
        self.combination: tuple[str, tuple[tuple[str, float], ...]] = ("", ())
        self.fetches: dict[str, Fetch] = {}
        # Models that it was to fetch ahead and did not bring, and since when: a task that needs them may say why.
        self.failed: dict[str, float] = {}
        # The models of the fetches that it was told of.
        self.told: tuple[str, ...] = ()
        # What it was told to fetch ahead since `since_s`.
        self.since_s = now_s
        self.fetched_bytes = 0

    def wait_s(self, now_s: float) -> float:
        """Until it would begin what is planned last, were everything held."""
        free_s = self._free_s - now_s
        wait_s = (free_s if free_s > 0 else 0.0) + self._work_s / self.view.slots
        return wait_s if self.asking or self.running else wait_s + self._away_s(now_s)

    def _away_s(self, now_s: float) -> float:
        """How much longer it may stay away, which grows as it does: one that is there for work asks for it."""
        return now_s - self.heard_s + AWAY_S

    def ahead_s(self, task: Waiting, now_s: float) -> float:
        """Until it begins a task that is planned here: its share of what is planned goes by its place."""
        share = bisect_left(self._order, (task.rank_s, task.key)) / len(self._order)
        wait_s = max(0.0, self._free_s - now_s) + self._work_s * share / self.view.slots
        return wait_s if self.asking or self.running else wait_s + self._away_s(now_s)

    def in_order(self) -> Iterator[Waiting]:
        return (self.planned[key] for _, key in self._order)

    def plan(self, task: Waiting, extra_s: float) -> None:
        """`extra_s`: what it takes there besides its work."""
        self.planned[task.key] = task
        insort(self._order, (task.rank_s, task.key))
        self._extra_s[task.key] = extra_s
        self._take(task)
        checkpoint = task.kind.checkpoint
        self.lined[checkpoint] = self.lined.get(checkpoint, 0) + 1

    def unplan(self, task: Waiting) -> None:
        self._work_s = max(0.0, self._work_s - self._taken_s.pop(task.key))
        del self.planned[task.key], self._extra_s[task.key]
        del self._order[bisect_left(self._order, (task.rank_s, task.key))]
        if not self.planned:
            self._work_s = 0.0
        checkpoint = task.kind.checkpoint
        self.lined[checkpoint] -= 1
        if not self.lined[checkpoint]:
            del self.lined[checkpoint]

    def revise(self, view: WorkerView) -> None:
        """The worker says something else of itself now."""
        self.view = view
        self.step_times.clear()
        self._work_s = 0.0
        for task in self.planned.values():
            self._take(task)

    def _take(self, task: Waiting) -> None:
        self._taken_s[task.key] = took_s = self.run_s(task) + self._extra_s[task.key]
        self._work_s += took_s

    def run_s(self, task: Waiting) -> float:
        """What the task itself takes, once all is loaded."""
        return self.view.task_s + (task.steps * self.step_s(task.kind) if task.steps else 0.0)

    def step_s(self, kind: Kind) -> float:
        """One evaluation of its checkpoint at its size."""
        return self.step_s_of((kind.family, kind.size_class))

    def step_s_of(self, which: tuple[str, int]) -> float:
        """One evaluation for a family and a size class."""
        known = self.step_times.get(which)
        if known is None:
            if len(self.step_times) >= STEP_TIMES_LIMIT:
                self.step_times.clear()
            known = self.step_times[which] = step_s(self.view, *which)
        return known

    def run(self, key: Key, end_s: float, now_s: float) -> None:
        self.running[key] = end_s
        self._sum_running(now_s)

    def stop(self, key: Key, now_s: float, *, heard: bool) -> None:
        """`heard`: the worker said so itself."""
        if self.running.pop(key, None) is not None:
            if heard:
                self.heard_s = now_s
            self._sum_running(now_s)

    def _sum_running(self, now_s: float) -> None:
        self._free_s = now_s + sum(max(0.0, end_s - now_s) for end_s in self.running.values()) / self.view.slots

    def link_free_s(self, now_s: float, *, sticky: bool) -> float:
        """When its link is free for one more; small models go before checkpoints."""
        free_s = now_s
        for fetch in self.fetches.values():
            if (sticky or not fetch.sticky) and fetch.ready_s > free_s:
                free_s = fetch.ready_s
        return free_s

    def begin(self, fetch: Fetch, now_s: float) -> None:
        """Checkpoints that are on their way come later for a small model that goes first."""
        if not fetch.sticky:
            by_s = fetch.size_bytes * 8 / self.view.link_bps
            for other in [each for each in self.fetches.values() if each.sticky]:
                self.fetches[other.model] = replace(other, ready_s=max(other.ready_s, now_s) + by_s)
        self.fetches[fetch.model] = fetch

    def wanted(self) -> list[Fetch]:
        """What it should fetch, the most urgent first: small ones, then in the order in which they were wanted."""
        return sorted(self.fetches.values(), key=lambda fetch: (fetch.sticky, fetch.start_s, fetch.model))


class Crowd:
    """Workers with something in common; adding, removing and looking at a few of them cost the same for any number."""

    __slots__ = ("_places", "_posts", "_turn")

    def __init__(self) -> None:
        self._posts: list[Post] = []
        self._places: dict[str, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._posts)

    def __contains__(self, worker: str) -> bool:
        return worker in self._places

    def __iter__(self) -> Iterator[Post]:
        return iter(self._posts)

    def add(self, post: Post) -> None:
        if post.view.id not in self._places:
            self._places[post.view.id] = len(self._posts)
            self._posts.append(post)

    def remove(self, worker: str) -> None:
        """No error where it is not."""
        place = self._places.pop(worker, None)
        if place is None:
            return
        last = self._posts.pop()
        if last.view.id != worker:
            self._posts[place] = last
            self._places[last.view.id] = place

    def some(self, count: int) -> list[Post]:
        """All of them, or that many, others with every call."""
        size = len(self._posts)
        if size <= count:
            return self._posts
        start = self._turn % size
        self._turn = start + count
        picked = self._posts[start : start + count]
        return picked + self._posts[: count - len(picked)]
