import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.kernel.process import run_blocking

PATIENCE_S = 10.0


class Work:
    """Begins, and ends when it may; with an `error` it fails."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.has_ended = False
        self._error = error

    def __call__(self) -> str:
        self.begun.set()
        assert self.may_end.wait(PATIENCE_S)
        self.has_ended = True
        if self._error:
            raise self._error
        return "done"


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as executor:
        yield executor


async def begun(work: Work) -> None:
    assert await asyncio.to_thread(work.begun.wait, PATIENCE_S)


async def test_work_gives_its_result_or_its_error(executor):
    work = Work()
    work.may_end.set()
    assert await run_blocking(executor, work) == "done"
    failing = Work(error=OSError("no"))
    failing.may_end.set()
    with pytest.raises(OSError, match="no"):
        await run_blocking(executor, failing)


async def test_a_cancelled_caller_waits_for_the_running_work(executor):
    work = Work()
    asker = asyncio.create_task(run_blocking(executor, work))
    await begun(work)
    asker.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not asker.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert work.has_ended


async def test_on_cancel_may_end_the_work_sooner(executor):
    work = Work()
    asker = asyncio.create_task(run_blocking(executor, work, on_cancel=work.may_end.set))
    await begun(work)
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert work.has_ended


async def test_work_that_waits_for_a_thread_is_cancelled_before_it_starts(executor):
    first, second = Work(), Work()
    running = asyncio.create_task(run_blocking(executor, first))
    await begun(first)
    waiting = asyncio.create_task(run_blocking(executor, second))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.may_end.set()
    assert await running == "done"
    assert not second.begun.is_set()


async def test_the_error_of_work_that_fails_after_a_cancellation_is_not_logged(executor):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    work = Work(error=OSError("too late"))
    asker = asyncio.create_task(run_blocking(executor, work, on_cancel=work.may_end.set))
    await begun(work)
    asker.cancel()
    await asyncio.wait([asker])
    del asker
    gc.collect()
    assert not complaints
