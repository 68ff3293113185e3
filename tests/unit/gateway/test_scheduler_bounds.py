"""What the scheduler promises on any input: every task is done, nothing is fetched twice, the index finds the best."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.scheduler import estimate
from services.gateway.scheduler.pace import ABSURD_FACTOR, SpeedStats, plausible
from services.gateway.scheduler.queue import WaitingTask
from services.gateway.scheduler.replication import (
    CHECKPOINTS_LIMIT,
    FETCHES_LIMIT,
    MODELS_LIMIT,
    Replication,
    ReplicationPolicy,
)
from services.gateway.scheduler.schedule import Scheduler
from services.gateway.scheduler.workers import WorkerView
from tests.fakes.scheduler import GB, a_task, a_view, kind_of

CHECKPOINTS = ("a", "b", "c")
LORAS = ("", "l0", "l1")
OFFERS = frozenset([*(f"checkpoint:{each}" for each in CHECKPOINTS), "lora:l0", "lora:l1"])

kinds = st.builds(
    lambda checkpoint, lora: kind_of(checkpoint, *filter(None, [lora])),
    st.sampled_from(CHECKPOINTS),
    st.sampled_from(LORAS),
)
workers = st.lists(
    st.builds(
        lambda held, step_s, link: {"held": held, "step_s": step_s, "link_bps": link * 1e6},
        st.frozensets(st.sampled_from([*CHECKPOINTS, "l0", "l1"])),
        st.sampled_from([0.1, 0.3, 1.0]),
        st.sampled_from([25, 100]),
    ),
    min_size=1,
    max_size=4,
)
jobs = st.lists(st.tuples(kinds, st.integers(-3, 3)), max_size=25)


class Fleet:
    """Workers that follow the plan, on a clock of their own."""

    def __init__(self, described: list[dict[str, object]]) -> None:
        policy = ReplicationPolicy(price=0.5, small_price=0.5)
        self.scheduler = Scheduler(Replication(policy))
        self.now_s = 0.0
        self.views: dict[str, WorkerView] = {}
        self.busy: dict[str, tuple[float, WaitingTask]] = {}
        self.coming: dict[str, dict[str, float]] = {}
        self.done: Counter[str] = Counter()
        for i, each in enumerate(described):
            view = a_view(f"w{i}", offers=OFFERS, **each)
            self.views[view.id] = view
            self.scheduler.seen(view, 0.0)
            self.scheduler.asks(view.id, 0.0)

    def turn(self) -> None:
        self.now_s += 1.0
        for worker in self.views:
            self._fetch(worker)
            if worker in self.busy and self.busy[worker][0] <= self.now_s:
                _, task = self.busy.pop(worker)
                self.done[task.key[0]] += 1
                self.scheduler.ended(task.key, self.now_s)
                self.scheduler.asks(worker, self.now_s)
            if worker not in self.busy:
                self._ask(worker)

    def _fetch(self, worker: str) -> None:
        """All at a time, each as long as if it were alone."""
        view, coming = self.views[worker], self.coming.setdefault(worker, {})
        for fetch in self.scheduler.fetches(worker):
            coming.setdefault(fetch.model, self.now_s + fetch.size_bytes * 8 / view.link_bps)
        here = {model for model, at_s in coming.items() if at_s <= self.now_s}
        if here:
            self.coming[worker] = {model: at_s for model, at_s in coming.items() if model not in here}
            self.views[worker] = replace(view, held=view.held | here)
            self.scheduler.seen(self.views[worker], self.now_s)

    def _ask(self, worker: str) -> None:
        for task in self.scheduler.choose(worker, 1, self.now_s):
            self.scheduler.remove(task.key)
            self.scheduler.started(worker, task, self.now_s)
            self.scheduler.answered(worker, self.now_s)
            took_s = self.scheduler.worker(worker).run_s(task) + 1.0
            self.busy[worker] = (self.now_s + took_s, task)


def tasks_of(wanted: list[tuple[object, int]]) -> list[WaitingTask]:
    return [a_task(str(i), kind=kind, rank_s=i - 30.0 * priority) for i, (kind, priority) in enumerate(wanted)]


@settings(max_examples=10, deadline=None)
@given(workers, jobs)
def test_every_task_is_done_once_and_in_a_time_that_its_work_explains(described, wanted) -> None:
    fleet, tasks = Fleet(described), tasks_of(wanted)
    for task in tasks:
        fleet.scheduler.add(task, 0.0)
    # One after the other on the slowest worker, each with its downloads and the patience that a plan gets.
    bound_s = (len(tasks) + 1) * (25.0 + GB * 8 / 25e6 * 1.2 + 60.0)
    while fleet.now_s < bound_s and (len(fleet.scheduler) or fleet.busy):
        fleet.turn()
    assert fleet.done == Counter(task.key[0] for task in tasks)


@settings(max_examples=15, deadline=None)
@given(workers, jobs)
def test_what_is_under_way_is_bounded_and_nothing_comes_twice(described, wanted) -> None:
    fleet = Fleet(described)
    for task in tasks_of(wanted):
        fleet.scheduler.add(task, fleet.now_s)
        for worker, view in fleet.views.items():
            fetches = fleet.scheduler.fetches(worker)
            models = [fetch.model for fetch in fetches]
            assert len(models) == len(set(models))
            assert not view.held & set(models)
            assert sum(not fetch.sticky for fetch in fetches) <= FETCHES_LIMIT + len(LORAS)
            # The best worker fetches a checkpoint with no replica; only workers with room fetch the others.
            assert sum(fetch.sticky for fetch in fetches) <= CHECKPOINTS_LIMIT + len(CHECKPOINTS)
    claims = [(claim.worker, claim.fetch.model) for claim in fleet.scheduler.take_claims()]
    assert len(claims) == len(set(claims))


@settings(max_examples=30, deadline=None)
@given(workers, jobs, kinds)
def test_the_best_worker_is_the_one_that_looking_at_all_of_them_finds(described, wanted, kind) -> None:
    fleet = Fleet(described)
    for task in tasks_of(wanted):
        fleet.scheduler.add(task, 0.0)
    task = a_task("new", kind=kind, rank_s=1_000.0)
    workers = [fleet.scheduler.worker(worker) for worker in fleet.views]
    near = [worker for worker in workers if kind.checkpoint in worker.view.held or kind.checkpoint in worker.fetches]
    expected = min(((estimate.estimate(worker, task, 0.0).cost_s, worker.view.id) for worker in near), default=None)
    found = estimate.best_of(fleet.scheduler._candidates(task), task, 0.0)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert abs(found.cost_s - expected[0]) < 1e-6
        again = estimate.estimate(found.worker, task, 0.0)
        assert abs(again.cost_s - found.cost_s) < 1e-6


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_an_absurd_speed_is_believed_a_few_times_off_the_usual_at_most(reported, usual) -> None:
    assert usual / ABSURD_FACTOR <= plausible(reported, usual) <= usual * ABSURD_FACTOR
    assert plausible(0.0, usual) == usual
    assert plausible(reported, 0.0) == reported


def test_a_worker_that_is_surely_slower_than_its_class_is_noticed_and_others_are_not() -> None:
    stats = SpeedStats()
    for turn in range(20):
        for worker in ("1", "2", "3", "4"):
            stats.done(worker, "cuda:small", "work", 5.0 + 0.1 * (turn % 3))
        stats.done("slow", "cuda:small", "work", 20.0)
        stats.done("other class", "cuda:tiny", "work", 40.0)
    assert "times as long as those of 4 others" in stats.fault_of("slow")
    assert [stats.fault_of(worker) for worker in ("1", "2", "3", "4", "other class")] == [""] * 5


def test_a_worker_that_fails_most_of_its_tasks_is_noticed() -> None:
    stats = SpeedStats()
    stats.done("good", "cpu", "work", 1.0)
    for _ in range(8):
        stats.failed("bad", "cpu")
    assert stats.fault_of("bad") == "of its last tasks 100% failed by its own fault, of others of its class 0%"


def test_a_worker_that_fails_as_much_as_its_class_is_not_to_blame() -> None:
    stats = SpeedStats()
    for worker in ("1", "2", "3"):
        stats.done(f"other {worker}", "cuda", "work", 1.0)
        for _ in range(8):
            stats.failed(worker, "cpu")
            stats.failed("alone in its class", "cpu/int8")
    assert [stats.fault_of(worker) for worker in ("1", "2", "3", "alone in its class")] == [""] * 4


def test_scores_are_kept_for_a_limited_number_of_models_the_most_recently_used() -> None:
    replication = Replication()
    for number in range(MODELS_LIMIT + 100):
        replication.add_loss("often", 1.0, 1, 10.0, 0.0)
        replication.add_loss(f"hf:org/{number}", 1.0, 1, 10.0, 0.0)
        replication.reset(f"hf:org/{number}", 0.0)
    assert len(replication._scores) == len(replication._reset_s) == MODELS_LIMIT
    assert replication._scores["often"][0] > MODELS_LIMIT
