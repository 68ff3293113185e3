"""Turns at a loaded model: those who wait with the same wish go together, and nobody gets another's error."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.preprocessor.lanes import Lane

PATIENCE_S = 20


@pytest.fixture
def lane():
    return Lane(batch_limit=3)


class Worker:
    """Notes its batches; the first waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Event()
        self.go = threading.Event()

    def __call__(self, items):
        self.batches.append(sorted(items))
        self.started.set()
        assert self.go.wait(PATIENCE_S)
        if len(items) > 1 and 13 in items:
            raise RuntimeError("one of them is unlucky")
        if items == [13]:
            raise ValueError("unlucky")
        return [item * 10 for item in items]


def run_behind_the_first(lane, wishes):
    """One call that has the lane, then these (key, item), which all wait; their results and the worker."""
    worker = Worker()
    with ThreadPoolExecutor(len(wishes) + 1) as pool:
        first = pool.submit(lane.run, "first", 1, worker)
        assert worker.started.wait(PATIENCE_S)
        calls = [pool.submit(lane.run, key, item, worker) for key, item in wishes]
        with lane._changed:
            assert lane._changed.wait_for(lambda: len(lane._waiting) == len(wishes) or _poke(lane), PATIENCE_S)
        worker.go.set()
        assert first.result(PATIENCE_S) == 10
        return worker, calls


def _poke(lane) -> bool:
    """Nobody tells that a waiter came, so look again soon."""
    lane._changed.wait(0.01)
    return False


def test_those_who_wait_with_the_same_wish_go_together(lane):
    worker, calls = run_behind_the_first(lane, [("a", 2), ("a", 3), ("b", 4)])
    assert [call.result(PATIENCE_S) for call in calls] == [20, 30, 40]
    assert sorted(worker.batches) == [[1], [2, 3], [4]]


def test_a_batch_has_a_limit(lane):
    worker, calls = run_behind_the_first(lane, [("a", item) for item in range(2, 7)])
    assert [call.result(PATIENCE_S) for call in calls] == [20, 30, 40, 50, 60]
    assert sorted(len(batch) for batch in worker.batches) == [1, 2, 3]


def test_nobody_gets_the_error_of_another(lane):
    _, calls = run_behind_the_first(lane, [("a", 12), ("a", 13)])
    assert calls[0].result(PATIENCE_S) == 120
    with pytest.raises(ValueError, match="unlucky"):
        calls[1].result(PATIENCE_S)


def test_a_lane_is_free_again_after_an_error(lane):
    with pytest.raises(ZeroDivisionError):
        lane.run("a", 0, lambda items: [1 / item for item in items])
    assert lane.run("a", 2, lambda items: [1 / item for item in items]) == 0.5
