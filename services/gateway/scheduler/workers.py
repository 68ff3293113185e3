"""What is planned, running and being fetched at each worker, and workers indexed by what they offer, take and hold.

The index answers from a few workers at a time, so that no request looks at the whole fleet. Pure.
"""

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from services.gateway.scheduler.pace import StepTimes, step_s
from services.gateway.scheduler.queue import Amounts, Key, TaskKind, WaitingTask, can_do

# The assumed size of a model that is named by a reference, while its size is unknown.
REFERENCE_BYTES = 10**9
# For how many families and sizes a worker's step time is cached.
STEP_TIMES_LIMIT = 256
# A free worker that has no poll open is expected no sooner.
AWAY_S = 1.0
# Of the workers that hold a checkpoint, those that hold a task's small models too are looked at first, up to this many.
LOOK_SMALL = 64
# For how many kinds of tasks it is cached which groups can do them.
ABLE_LIMIT = 4_096
CHECKPOINT = "checkpoint:"
STAGE = "stage:"

# Stage, offers and limits.
_GroupId = tuple[str, frozenset[str], Amounts]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as it described itself, limited to plausible values."""

    id: str
    node: str
    stage: str
    offers: frozenset[str]
    # Needs that it is given only where no other worker can do the task; `stage:NAME` of its stage means every task.
    avoided: frozenset[str] = frozenset()
    # The most that it takes, by name; sorted.
    limits: Amounts = ()
    slots: int = 1
    vram: frozenset[str] = frozenset()
    ram: frozenset[str] = frozenset()
    # On disk, in RAM or in VRAM.
    held: frozenset[str] = frozenset()
    # Sizes of the models that it offers, held or not. One without a size costs nothing to fetch.
    sizes: Mapping[str, int] = field(default_factory=dict)
    # Bits a second.
    link_bps: float
    # As it measured them.
    step_times: StepTimes = field(default_factory=dict)
    # What is usual for workers on the same device.
    usual_times: StepTimes = field(default_factory=dict)
    # What a task takes besides its steps.
    task_s: float = 0.0
    # It fetches models ahead on request.
    takes_fetches: bool = False
    # What it may fill with models; 0 where it does not say.
    disk_bytes: int = 0
    # Models that it was asked to prefetch and could not.
    unfetched: frozenset[str] = frozenset()

    def can_do(self, kind: TaskKind) -> bool:
        return self.stage == kind.stage and can_do(self.offers, self.limits, kind.needs, kind.amounts)

    def avoids(self, task: WaitingTask) -> bool:
        """Other workers go first: its node failed the task, or something that the task needs is avoided there."""
        return self.node in task.failed_nodes or (bool(self.avoided) and self.avoids_kind(task.kind))

    def avoids_kind(self, kind: TaskKind) -> bool:
        return f"{STAGE}{kind.stage}" in self.avoided or not self.avoided.isdisjoint(kind.parts)

    def lacks(self, models: frozenset[str]) -> list[str]:
        """Those that it would have to fetch."""
        return [model for model in models - self.held if self.size_of(model)]

    def size_of(self, model: str) -> int:
        """A guess for a model named by a reference, such as `hf:org/repo`: its size is unknown before it is fetched."""
        return self.sizes.get(model, REFERENCE_BYTES if ":" in model or "/" in model else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFetch:
    """A model that a worker should prefetch (prefetch), and when it is expected to have it."""

    model: str
    size_bytes: int
    start_s: float
    ready_s: float
    # A checkpoint: one more replica of it, which no single task owns.
    sticky: bool

    def left_bytes(self, now_s: float) -> float:
        """By the plan, not by what the worker reports."""
        whole_s = self.ready_s - self.start_s
        return self.size_bytes * min(1.0, max(0.0, (self.ready_s - now_s) / whole_s)) if whole_s else 0.0


class WorkerState:
    """A worker in the plan."""

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
        "planned",
        "planned_checkpoints",
        "reported_fetches",
        "running",
        "since_s",
        "step_times",
        "view",
    )

    def __init__(self, view: WorkerView, now_s: float) -> None:
        self.view = view
        # How many polls for work it has open, and when it was last known to be there for work.
        self.asking = 0
        self.heard_s = now_s
        # Waiting tasks that are planned here, how many of each checkpoint, and their work in seconds.
        self.planned: dict[Key, WaitingTask] = {}
        self.planned_checkpoints: dict[str, int] = {}
        self._order: list[tuple[float, Key]] = []
        self._work_s = 0.0
        # What each of them takes besides its work: loading and patching.
        self._extra_s: dict[Key, float] = {}
        # What each of them adds to the work.
        self._taken_s: dict[Key, float] = {}
        # Cached seconds per evaluation, by family and size class.
        self.step_times: dict[tuple[str, int], float] = {}
        # Leased tasks, and when each one should end.
        self.running: dict[Key, float] = {}
        self._free_s = 0.0
        # The checkpoint and LoRAs of the last task that it was given.
        self.combination: tuple[str, tuple[tuple[str, float], ...]] = ("", ())
        self.fetches: dict[str, PlannedFetch] = {}
        # Models that it failed to prefetch, and since when: a task that needs one may run here, to report the error.
        self.failed: dict[str, float] = {}
        # The models of the fetches that were reported to it.
        self.reported_fetches: tuple[str, ...] = ()
        # How much it was asked to prefetch since `since_s`.
        self.since_s = now_s
        self.fetched_bytes = 0

    def wait_s(self, now_s: float) -> float:
        """Until it would begin one more task, if it held all models."""
        free_s = self._free_s - now_s
        wait_s = (free_s if free_s > 0 else 0.0) + self._work_s / self.view.slots
        return wait_s if self.asking or self.running else wait_s + self._away_s(now_s)

    def _away_s(self, now_s: float) -> float:
        """How much longer a worker without a poll may stay away; it grows with the time that it has been away."""
        return now_s - self.heard_s + AWAY_S

    def ahead_s(self, task: WaitingTask, now_s: float) -> float:
        """Until it begins a task that is planned here: the part of the planned work that its position has before it."""
        share = bisect_left(self._order, (task.rank_s, task.key)) / len(self._order)
        wait_s = max(0.0, self._free_s - now_s) + self._work_s * share / self.view.slots
        return wait_s if self.asking or self.running else wait_s + self._away_s(now_s)

    def in_order(self) -> Iterator[WaitingTask]:
        return (self.planned[key] for _, key in self._order)

    def plan(self, task: WaitingTask, extra_s: float) -> None:
        """`extra_s`: what the task takes there besides its work."""
        self.planned[task.key] = task
        insort(self._order, (task.rank_s, task.key))
        self._extra_s[task.key] = extra_s
        self._add_work(task)
        checkpoint = task.kind.checkpoint
        self.planned_checkpoints[checkpoint] = self.planned_checkpoints.get(checkpoint, 0) + 1

    def rerank(self, before: WaitingTask, after: WaitingTask) -> None:
        """The same planned task with another rank."""
        del self._order[bisect_left(self._order, (before.rank_s, before.key))]
        insort(self._order, (after.rank_s, after.key))
        self.planned[after.key] = after

    def unplan(self, task: WaitingTask) -> None:
        self._work_s = max(0.0, self._work_s - self._taken_s.pop(task.key))
        del self.planned[task.key], self._extra_s[task.key]
        del self._order[bisect_left(self._order, (task.rank_s, task.key))]
        if not self.planned:
            self._work_s = 0.0
        checkpoint = task.kind.checkpoint
        self.planned_checkpoints[checkpoint] -= 1
        if not self.planned_checkpoints[checkpoint]:
            del self.planned_checkpoints[checkpoint]

    def revise(self, view: WorkerView) -> None:
        """The worker describes itself differently now."""
        self.view = view
        self.step_times.clear()
        self._work_s = 0.0
        for task in self.planned.values():
            self._add_work(task)

    def _add_work(self, task: WaitingTask) -> None:
        self._taken_s[task.key] = took_s = self.run_s(task) + self._extra_s[task.key]
        self._work_s += took_s

    def run_s(self, task: WaitingTask) -> float:
        """What the task itself takes, once all is loaded."""
        return self.view.task_s + (task.steps * self.step_s(task.kind) if task.steps else 0.0)

    def step_s(self, kind: TaskKind) -> float:
        """One evaluation of its checkpoint at its size."""
        return self.step_s_of((kind.family, kind.size_class))

    def step_s_of(self, which: tuple[str, int]) -> float:
        """One evaluation for a family and a size class."""
        known = self.step_times.get(which)
        if known is None:
            if len(self.step_times) >= STEP_TIMES_LIMIT:
                self.step_times.clear()
            known = self.step_times[which] = step_s(self.view.step_times, self.view.usual_times, *which)
        return known

    def run(self, key: Key, end_s: float, now_s: float) -> None:
        self.running[key] = end_s
        self._sum_running(now_s)

    def stop(self, key: Key, now_s: float, *, heard: bool) -> None:
        """`heard`: the worker reported it itself."""
        if self.running.pop(key, None) is not None:
            if heard:
                self.heard_s = now_s
            self._sum_running(now_s)

    def _sum_running(self, now_s: float) -> None:
        self._free_s = now_s + sum(max(0.0, end_s - now_s) for end_s in self.running.values()) / self.view.slots

    def link_free_s(self, now_s: float, *, sticky: bool) -> float:
        """When its link is free for one more fetch; small models go before checkpoints."""
        free_s = now_s
        for fetch in self.fetches.values():
            if (sticky or not fetch.sticky) and fetch.ready_s > free_s:
                free_s = fetch.ready_s
        return free_s

    def begin(self, fetch: PlannedFetch, now_s: float) -> None:
        """A small model goes first and delays the checkpoints that are on their way."""
        if not fetch.sticky:
            by_s = fetch.size_bytes * 8 / self.view.link_bps
            for other in [each for each in self.fetches.values() if each.sticky]:
                self.fetches[other.model] = replace(other, ready_s=max(other.ready_s, now_s) + by_s)
        self.fetches[fetch.model] = fetch

    def fetches_in_order(self) -> list[PlannedFetch]:
        """What it should fetch, the most urgent first: small models, then by when the fetch was planned."""
        return sorted(self.fetches.values(), key=lambda fetch: (fetch.sticky, fetch.start_s, fetch.model))


class WorkerGroup:
    """Workers with something in common. Adding, removing and sampling cost the same for any number of workers."""

    __slots__ = ("_members", "_positions", "_turn")

    def __init__(self) -> None:
        self._members: list[WorkerState] = []
        self._positions: dict[str, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._positions

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._members)

    def add(self, worker: WorkerState) -> None:
        if worker.view.id not in self._positions:
            self._positions[worker.view.id] = len(self._members)
            self._members.append(worker)

    def remove(self, worker_id: str) -> None:
        """No error where it is not a member."""
        position = self._positions.pop(worker_id, None)
        if position is None:
            return
        last = self._members.pop()
        if last.view.id != worker_id:
            self._members[position] = last
            self._positions[last.view.id] = position

    def sample(self, count: int) -> list[WorkerState]:
        """All of them, or that many; other ones with every call."""
        size = len(self._members)
        if size <= count:
            return self._members
        start = self._turn % size
        self._turn = start + count
        picked = self._members[start : start + count]
        return picked + self._members[: count - len(picked)]


class _EqualWorkers(WorkerGroup):
    """Workers of a stage that offer exactly the same and have the same limits: most fleets have few such groups."""

    __slots__ = ("_checkpoints", "limits", "offers", "stage")

    def __init__(self, group_id: _GroupId) -> None:
        super().__init__()
        self.stage, self.offers, self.limits = group_id
        # The checkpoints that they offer, rotated as they are looked through.
        self._checkpoints: deque[str] | None = None

    def can_do(self, kind: TaskKind) -> bool:
        return self.stage == kind.stage and can_do(self.offers, self.limits, kind.needs, kind.amounts)

    def next_checkpoints(self, count: int) -> list[str]:
        """Other ones with every call."""
        if self._checkpoints is None:
            names = sorted(need for need in self.offers if need.startswith(CHECKPOINT))
            self._checkpoints = deque(need.removeprefix(CHECKPOINT) for need in names)
        looked = [self._checkpoints[i] for i in range(min(count, len(self._checkpoints)))]
        self._checkpoints.rotate(-len(looked))
        return looked


class WorkerIndex:
    """All workers that the scheduler counts on: by id, by what they offer and take, and by the models they hold."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerState] = {}
        self.slots = 0
        self._groups: dict[_GroupId, _EqualWorkers] = {}
        # How many of these groups each stage has.
        self._groups_of_stage: Counter[str] = Counter()
        # By worker, the group that it is in.
        self._group_of: dict[str, _EqualWorkers] = {}
        self._able: dict[tuple[str, frozenset[str], Amounts], dict[WorkerGroup, None]] = {}
        # Where sampling goes on when there are too many groups to look at.
        self._turn = 0
        # By stage and model, its replicas: the workers that hold it or are fetching it. Per stage, for what a worker of
        # another stage says to hold is no reason to give it a task of this one.
        self._holders: dict[tuple[str, str], WorkerGroup] = {}
        # How many workers have something avoided.
        self.avoiding = 0

    def add(self, worker: WorkerState) -> None:
        self.workers[worker.view.id] = worker
        self.slots += worker.view.slots
        self.avoiding += bool(worker.view.avoided)
        self._join(worker)
        for model in worker.view.held:
            self._hold(worker, model)

    def remove(self, worker: WorkerState) -> None:
        del self.workers[worker.view.id]
        self.slots -= worker.view.slots
        self.avoiding -= bool(worker.view.avoided)
        self._leave(worker)
        for model in worker.view.held | worker.fetches.keys():
            self._unhold(worker, model)

    def revise(self, worker: WorkerState, view: WorkerView) -> None:
        before = worker.view
        if before.stage != view.stage:
            self.remove(worker)
            worker.revise(view)
            self.add(worker)
            for model in worker.fetches:
                self._hold(worker, model)
            return
        self.slots += view.slots - before.slots
        self.avoiding += bool(view.avoided) - bool(before.avoided)
        if _group_id(before) != _group_id(view):
            self._leave(worker)
            worker.revise(view)
            self._join(worker)
        else:
            worker.revise(view)
        if before.held != view.held:
            for model in view.held - before.held:
                self._hold(worker, model)
            for model in before.held - view.held - worker.fetches.keys():
                self._unhold(worker, model)

    def _join(self, worker: WorkerState) -> None:
        group_id = _group_id(worker.view)
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = _EqualWorkers(group_id)
            self._groups_of_stage[group.stage] += 1
            self._able.clear()
        group.add(worker)
        self._group_of[worker.view.id] = group

    def _leave(self, worker: WorkerState) -> None:
        group = self._group_of.pop(worker.view.id)
        group.remove(worker.view.id)
        if not group:
            del self._groups[group.stage, group.offers, group.limits]
            self._groups_of_stage[group.stage] -= 1
            self._able.clear()

    def _hold(self, worker: WorkerState, model: str) -> None:
        self._holders.setdefault((worker.view.stage, model), WorkerGroup()).add(worker)

    def _unhold(self, worker: WorkerState, model: str) -> None:
        which = worker.view.stage, model
        holders = self._holders.get(which)
        if holders is not None:
            holders.remove(worker.view.id)
            if not holders:
                del self._holders[which]

    def expect(self, worker: WorkerState, model: str) -> None:
        """It fetches the model, so it counts as a holder."""
        self._hold(worker, model)

    def drop(self, worker: WorkerState, model: str) -> None:
        """It does not fetch the model after all."""
        if model not in worker.view.held:
            self._unhold(worker, model)

    def has_replica(self, stage: str, model: str) -> bool:
        """Some worker of the stage holds it, or is fetching it."""
        return (stage, model) in self._holders

    def holders(self, stage: str, model: str) -> WorkerGroup:
        return self._holders.get((stage, model)) or WorkerGroup()

    def able(self, kind: TaskKind) -> dict[WorkerGroup, None]:
        """The groups whose workers offer all that the kind needs, held or not, and take its amounts; in order."""
        which = (kind.stage, kind.needs, kind.amounts)
        able = self._able.get(which)
        if able is None:
            if len(self._able) >= ABLE_LIMIT:
                del self._able[next(iter(self._able))]
            able = self._able[which] = {group: None for group in self._groups.values() if group.can_do(kind)}
        return able

    def sample_able(self, kind: TaskKind, count: int) -> Iterator[WorkerState]:
        """Some of the workers that can do it: as many from each group, at least one from each of `count` groups."""
        able = list(self.able(kind))
        if len(able) > count:
            start = self._turn % len(able)
            self._turn += count
            able = [able[(start + i) % len(able)] for i in range(count)]
        for group in able:
            yield from group.sample(max(1, count // len(able)))

    def like(self, worker: WorkerState) -> WorkerGroup:
        """The workers that offer exactly what it offers."""
        return self._group_of[worker.view.id]

    def next_unheld(self, worker: WorkerState, count: int) -> list[str]:
        """Of the next checkpoints that it offers, those without a replica; other ones with every call."""
        offered = self._group_of[worker.view.id].next_checkpoints(count)
        return [model for model in offered if not self.has_replica(worker.view.stage, model)]

    def near(self, kind: TaskKind, count: int) -> list[WorkerState]:
        """Some workers that can do it without fetching its checkpoint; those that hold its small models come first."""
        if not kind.checkpoint:
            return list(self.sample_able(kind, count))
        able, holding = self.able(kind), self._holding(kind, count)
        if len(able) == self._groups_of_stage[kind.stage]:
            return holding
        return [worker for worker in holding if self._group_of[worker.view.id] in able]

    def _holding(self, kind: TaskKind, count: int) -> list[WorkerState]:
        holders = self._holders.get((kind.stage, kind.checkpoint))
        if holders is None:
            return []
        if len(holders) <= count:
            return holders.sample(count)
        small = [worker for worker in self._holding_small(kind) if worker.view.id in holders]
        return small + holders.sample(count)

    def _holding_small(self, kind: TaskKind) -> Iterator[WorkerState]:
        for model in kind.models:
            if model != kind.checkpoint and self.has_replica(kind.stage, model):
                yield from self._holders[kind.stage, model].sample(LOOK_SMALL)


def _group_id(view: WorkerView) -> _GroupId:
    return view.stage, view.offers, view.limits
