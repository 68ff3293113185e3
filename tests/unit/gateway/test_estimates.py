"""The sums that placing goes by: loads, downloads, shares and speed statistics, each by itself."""

import pytest

from services.gateway.scheduler.estimate import BUS_BYTES_PER_S, DISK_BYTES_PER_S, best_of, estimate, load_s
from services.gateway.scheduler.pace import TASKS_MIN, SpeedStats
from services.gateway.scheduler.workers import AWAY_S, PlannedFetch, WorkerState
from tests.fakes.scheduler import GB, a_task, a_view

BUS_S, DISK_S = GB / BUS_BYTES_PER_S, GB / DISK_BYTES_PER_S


def test_a_checkpoint_is_loaded_from_where_it_is() -> None:
    views = [a_view(), a_view(ram=frozenset({"a"})), a_view(vram=frozenset({"a"}))]
    assert [load_s(WorkerState(view, 0.0), "a") for view in views] == pytest.approx([BUS_S + DISK_S, BUS_S, 0.0])


def test_a_task_loads_its_checkpoint_itself_unless_another_with_the_same_is_planned_too() -> None:
    worker, task = WorkerState(a_view(), 0.0), a_task("t")
    assert estimate(worker, task, 0.0).load_s == pytest.approx(BUS_S + DISK_S)
    worker.plan(task, 0.0)
    assert estimate(worker, task, 0.0).load_s == pytest.approx(BUS_S + DISK_S)
    worker.plan(a_task("other"), 0.0)
    assert estimate(worker, task, 0.0).load_s == 0.0


@pytest.mark.parametrize("order", [("v", "w"), ("w", "v")])
def test_of_two_workers_that_are_alike_the_one_with_the_lesser_id_is_best(order: tuple[str, str]) -> None:
    best = best_of([WorkerState(a_view(name), 0.0) for name in order], a_task("t"), 0.0)
    assert best is not None
    assert best.worker.view.id == "v"


def fetch(model: str, *, size_bytes: int, ready_s: float, sticky: bool, start_s: float = 0.0) -> PlannedFetch:
    return PlannedFetch(model=model, size_bytes=size_bytes, start_s=start_s, ready_s=ready_s, sticky=sticky)


def test_a_small_model_goes_before_a_checkpoint_which_comes_later_by_its_time() -> None:
    worker = WorkerState(a_view(link_bps=8e6), 0.0)
    worker.begin(fetch("c", size_bytes=100_000_000, ready_s=100.0, sticky=True), 0.0)
    worker.begin(fetch("l", size_bytes=5_000_000, ready_s=15.0, sticky=False, start_s=10.0), 10.0)
    assert [each.model for each in worker.fetches_in_order()] == ["l", "c"]
    assert worker.fetches["c"].ready_s == 105.0
    assert (worker.link_free_s(10.0, sticky=False), worker.link_free_s(10.0, sticky=True)) == (15.0, 105.0)


def test_a_worker_that_does_not_say_itself_that_a_task_ended_is_not_taken_for_there() -> None:
    waits_s = []
    for heard in (True, False):
        worker = WorkerState(a_view(), 0.0)
        worker.run(("t", 1), 5.0, 0.0)
        worker.stop(("t", 1), 60.0, heard=heard)
        waits_s.append(worker.wait_s(60.0))
    assert waits_s == [AWAY_S, 60.0 + AWAY_S]


def test_a_worker_whose_times_vary_widely_is_not_surely_slow() -> None:
    def judged(*times_s: float) -> str:
        stats = SpeedStats()
        for number in range(4 * TASKS_MIN):
            for other in ("u", "v", "w"):
                stats.done(other, "gpu", number, 1.0)
            stats.done("slow", "gpu", number, times_s[number % len(times_s)])
        return stats.fault_of("slow")

    assert judged(4.0).startswith("its tasks take")
    # The same on the average.
    assert judged(1.0, 16.0) == ""
