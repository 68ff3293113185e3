"""Fair shares: whose task is next, whatever priorities say and however long queues are."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.scheduler.queue import Key, TaskQueues, WaitingTask, queue_of
from services.gateway.scheduler.shares import NOBODY, Share, Shares, equal_share
from tests.fakes.scheduler import a_task

KIND = a_task("0").kind
LOOK = 32


class Line:
    """A queue of one kind of task; `serve` takes the first one."""

    def __init__(self, share_of: Callable[[str], Share] = equal_share) -> None:
        self.shares = Shares(share_of)
        self.queues = TaskQueues()
        self._now_s = 0.0

    def come(self, name: str, tenant: str, *, priority: int = 0) -> None:
        self._now_s += 0.001
        key = (name, 1)
        rank = self.shares.enter(
            key, tenant, create_time_s=self._now_s, priority=priority, among=lambda: self.first(LOOK)
        )
        self.queues.add(a_task(name, rank_s=rank, tenant=tenant))

    def first(self, count: int) -> list[WaitingTask]:
        return self.queues.first(queue_of(KIND), count)

    def rerank(self, limit: int = 1_000_000) -> list[Key]:
        moved = self.shares.pop_moved(limit)
        for key in moved:
            task = self.queues.remove(key)
            assert task is not None
            self.queues.add(a_task(key[0], rank_s=self.shares.rank_of(key), tenant=task.tenant))
        return moved

    def serve(self, *, end: bool = True) -> WaitingTask:
        [task] = self.first(1)
        self.queues.remove(task.key)
        self.shares.leave(task.key)
        if end:
            self.shares.forget(task.key)
        return task

    def cancel(self, name: str) -> None:
        self.queues.remove((name, 1))
        self.shares.forget((name, 1))

    def served(self, count: int) -> str:
        return "".join(self.serve().tenant for _ in range(count))


def names(prefix: str, count: int) -> Iterable[str]:
    return (f"{prefix}{number:05}" for number in range(count))


@pytest.mark.parametrize("priority", [-100, 0, 1, 100])
def test_one_task_goes_before_a_thousand_of_another_tenant(priority: int) -> None:
    line = Line()
    for name in names("a", 1_000):
        line.come(name, "A", priority=priority)
    for try_number in range(50):
        line.served(7)
        line.come(f"b{try_number}", "B")
        assert line.serve().tenant == "B"


def test_what_comes_later_with_priority_does_not_go_before_anothers_waiting_task() -> None:
    line = Line()
    for name in names("a", 100):
        line.come(name, "A")
    line.come("b", "B")
    for name in names("urgent", 100):
        line.come(name, "A", priority=100)
    line.rerank()
    assert line.serve().tenant == "B"


def test_two_tenants_with_much_to_do_take_turns_whoever_came_first() -> None:
    line = Line()
    for name in names("a", 100):
        line.come(name, "A")
    line.served(50)
    for name in names("b", 100):
        line.come(name, "B")
    assert line.served(40).count("B") in (20, 21)


def test_priority_orders_a_tenants_own_tasks() -> None:
    line = Line()
    for name in names("usual", 20):
        line.come(name, "A")
    line.come("urgent", "A", priority=10)
    line.come("lazy", "A", priority=-10)
    line.come("usual99", "A")
    line.rerank()
    order = [line.serve().key[0] for _ in range(23)]
    assert order == ["urgent", *names("usual", 20), "usual99", "lazy"]


def test_a_higher_weight_is_a_larger_share() -> None:
    line = Line(lambda tenant: Share(weight=3.0 if tenant == "A" else 1.0))
    for tenant in ("A", "B"):
        for name in names(tenant, 200):
            line.come(name, tenant)
    assert 58 <= line.served(80).count("A") <= 62


def test_a_higher_class_goes_before_all_others_and_its_tenants_share_it() -> None:
    line = Line(lambda tenant: Share(service_class=1 if tenant in ("X", "Y") else 0))
    for tenant in ("A", "X", "Y"):
        for name in names(tenant, 10):
            line.come(name, tenant)
    first = line.served(20)
    assert "A" not in first
    assert first[:10].count("X") in (5, 6)


def test_a_grant_holds_for_tasks_that_wait_already() -> None:
    line = Line()
    for tenant in ("A", "B"):
        for name in names(tenant, 10):
            line.come(name, tenant)
    line.shares.grant("B", Share(service_class=1))
    line.rerank()
    assert line.served(10) == "B" * 10


def test_who_came_for_little_waits_behind_who_came_for_little_before() -> None:
    line = Line()
    for name in names("a", 100):
        line.come(name, "A")
    for tenant in "BCDE":
        line.come(tenant.lower(), tenant)
    assert line.served(4) == "BCDE"


def test_a_check_takes_nothing_of_a_share_and_waits_behind_the_tenants() -> None:
    line = Line()
    line.come("check", NOBODY)
    for name in names("a", 100):
        line.come(name, "A")
    assert line.served(100) == "A" * 100
    assert line.serve().key[0] == "check"


def test_a_task_that_comes_back_has_the_place_that_it_had() -> None:
    line = Line()
    for name in names("a", 10):
        line.come(name, "A")
    lost = line.serve(end=False)
    line.served(3)
    line.come(lost.key[0], "A")
    line.rerank()
    assert line.serve().key == lost.key


def test_a_tenant_that_is_done_owes_nothing() -> None:
    line = Line()
    for name in names("a", 1_000):
        line.come(name, "A")
    line.served(1_000)
    for tenant in ("B", "A"):
        for name in names(tenant, 10):
            line.come(name, tenant)
    assert line.served(10).count("A") == 5


def test_nothing_is_remembered_of_what_has_ended() -> None:
    line = Line()
    for tenant in "ABC":
        for name in names(tenant, 10):
            line.come(name, tenant, priority=3)
    line.served(30)
    assert not line.shares._lines
    assert not line.shares._entries
    assert not line.shares._open
    assert line.shares.pop_moved(10) == []


def test_ranks_change_a_bounded_number_at_a_time() -> None:
    line = Line()
    for name in names("a", 100):
        line.come(name, "A")
    line.come("urgent", "A", priority=100)
    counts = []
    while moved := line.rerank(30):
        counts.append(len(moved))
    assert counts == [30, 30, 30, 10]


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.sampled_from("ABC"), st.integers(-5, 5)),
        st.tuples(st.just("serve"), st.booleans(), st.just(0)),
        st.tuples(st.just("rerank"), st.integers(1, 5), st.just(0)),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(ACTS)
def test_after_a_rerank_each_tenants_tasks_stand_in_its_own_order(acts: list[tuple]) -> None:
    line, leased = Line(), []
    priorities: dict[str, float] = {}
    for number, (act, what, priority) in enumerate(acts):
        if act == "come":
            line.come(f"t{number:04}", what, priority=priority)
            priorities[f"t{number:04}"] = line._now_s - 30.0 * priority
        elif act == "rerank":
            line.rerank(what)
        elif line.first(1):
            task = line.serve(end=what)
            if not what:
                leased.append(task)
    for task in leased[::2]:
        line.shares.enter(task.key, task.tenant, create_time_s=0.0, priority=0, among=lambda: line.first(LOOK))
        line.queues.add(a_task(task.key[0], rank_s=line.shares.rank_of(task.key), tenant=task.tenant))
    line.rerank()
    waiting = line.first(1_000)
    for tenant in "ABC":
        mine = [priorities[task.key[0]] for task in waiting if task.tenant == tenant]
        assert mine == sorted(mine)
        assert line.shares.waiting_of(tenant) == len(mine)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("AB"), st.integers(-100, 100)), min_size=20, max_size=80))
def test_a_newcomer_is_next_whatever_the_others_asked_for(asked: list[tuple[str, int]]) -> None:
    line = Line()
    for number, (tenant, priority) in enumerate([*asked, ("A", 0), ("A", 0), ("B", 0), ("B", 0)]):
        line.come(f"t{number:04}", tenant, priority=priority)
    line.come("newcomer", "C")
    line.rerank()
    assert line.serve().tenant == "C"


class TwoQueues:
    """Tasks of two checkpoints; a worker that has both takes what ranks first of both."""

    def __init__(self) -> None:
        self.shares, self.queues = Shares(equal_share), TaskQueues()

    def come(self, name: str, tenant: str, checkpoint: str, *, priority: int = 0) -> None:
        kind = replace(KIND, checkpoint=checkpoint)
        rank = self.shares.enter(
            (name, 1),
            tenant,
            create_time_s=float(len(self.queues)),
            priority=priority,
            among=lambda: self.queues.first(queue_of(kind), LOOK),
            fronts=lambda: self.queues.fronts(kind.stage, 16, 4),
        )
        self.queues.add(a_task(name, kind=kind, rank_s=rank, tenant=tenant))
        for key in self.shares.pop_moved(1_000_000):
            task = self.queues.remove(key)
            assert task is not None
            self.queues.add(replace(task, rank_s=self.shares.rank_of(key)))

    def order(self) -> list[WaitingTask]:
        tasks = [task for name in "xy" for task in self.queues.first(queue_of(replace(KIND, checkpoint=name)), 1_000)]
        return sorted(tasks, key=lambda task: (task.rank_s, task.key))


@pytest.mark.parametrize("checkpoint", ["x", "y"])
def test_a_newcomer_is_before_the_tasks_of_every_checkpoint(checkpoint: str) -> None:
    both = TwoQueues()
    for number in range(100):
        both.come(f"a{number:03}", "A", "xy"[number % 7 > 2], priority=number % 5)
    both.come("b", "B", checkpoint)
    assert both.order()[0].key == ("b", 1)


def test_the_newcomers_next_tasks_stand_with_those_of_their_checkpoint() -> None:
    both = TwoQueues()
    for number in range(100):
        both.come(f"a{number:03}", "A", "x" if number < 50 else "y")
    for number in range(10):
        both.come(f"b{number:03}", "B", "y")
    of_b = [place for place, task in enumerate(both.order()) if task.tenant == "B"]
    assert of_b[0] == 0
    assert of_b[1] >= 50


def _beside_another(line: Line) -> None:
    """Two tenants with much to do, one of them with a task that is worked on all the time."""
    for name in names("a", 500):
        line.come(name, "A")
    for name in names("b", 500):
        line.come(name, "B")
    while line.serve(end=False).tenant != "A":
        pass


@pytest.mark.parametrize("step", [1, -1])
def test_what_is_canceled_while_it_waits_costs_nothing(step: int) -> None:
    """In whatever order it is canceled, what the tenant sends then waits as if that had never been sent."""
    line = Line()
    _beside_another(line)
    for name in list(names("a", 500))[1:][::step]:
        line.cancel(name)
    line.rerank()
    line.come("next", "A")
    assert "A" in line.served(2)


def test_what_is_left_after_others_were_canceled_moves_up() -> None:
    line = Line()
    _beside_another(line)
    for name in list(names("a", 500))[1:498]:
        line.cancel(name)
    line.rerank()
    assert line.served(6).count("A") >= 2


def test_canceling_and_sending_again_gains_nothing() -> None:
    line, gained = Line(), 0
    _beside_another(line)
    for round_number in range(20):
        for name in [key[0] for key in line.shares._entries if line.shares._entries[key].waits]:
            if not name.startswith("b"):
                line.cancel(name)
        for name in names(f"again{round_number}-", 5):
            line.come(name, "A")
        line.rerank()
        gained += line.served(2).count("A")
    assert gained <= 21
