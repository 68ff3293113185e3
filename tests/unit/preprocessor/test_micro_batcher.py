"""Calls that wait with an equal key are run as one batch, and no call gets another call's error."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.preprocessor.cache import MicroBatcher

PATIENCE_S = 20


@pytest.fixture
def batcher():
    return MicroBatcher(batch_limit=3)


class Worker:
    """Records its batches; the first one waits until it may go on."""

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


def run_behind_the_first(batcher, waiting):
    """One call that runs, then these (key, item), which all wait. Returns the worker and the waiting calls."""
    worker = Worker()
    with ThreadPoolExecutor(len(waiting) + 1) as pool:
        first = pool.submit(batcher.run, "first", 1, worker)
        assert worker.started.wait(PATIENCE_S)
        calls = [pool.submit(batcher.run, key, item, worker) for key, item in waiting]
        with batcher._changed:
            assert batcher._changed.wait_for(
                lambda: len(batcher._waiting) == len(waiting) or _poke(batcher), PATIENCE_S
            )
        worker.go.set()
        assert first.result(PATIENCE_S) == 10
        return worker, calls


def _poke(batcher) -> bool:
    """A new waiter does not notify, so look again soon."""
    batcher._changed.wait(0.01)
    return False


def test_calls_with_an_equal_key_are_run_together(batcher):
    worker, calls = run_behind_the_first(batcher, [("a", 2), ("a", 3), ("b", 4)])
    assert [call.result(PATIENCE_S) for call in calls] == [20, 30, 40]
    assert sorted(worker.batches) == [[1], [2, 3], [4]]


def test_a_batch_has_a_limit(batcher):
    worker, calls = run_behind_the_first(batcher, [("a", item) for item in range(2, 7)])
    assert [call.result(PATIENCE_S) for call in calls] == [20, 30, 40, 50, 60]
    assert sorted(len(batch) for batch in worker.batches) == [1, 2, 3]


def test_no_call_gets_the_error_of_another(batcher):
    _, calls = run_behind_the_first(batcher, [("a", 12), ("a", 13)])
    assert calls[0].result(PATIENCE_S) == 120
    with pytest.raises(ValueError, match="unlucky"):
        calls[1].result(PATIENCE_S)


def test_the_batcher_works_again_after_an_error(batcher):
    with pytest.raises(ZeroDivisionError):
        batcher.run("a", 0, lambda items: [1 / item for item in items])
    assert batcher.run("a", 2, lambda items: [1 / item for item in items]) == 0.5
