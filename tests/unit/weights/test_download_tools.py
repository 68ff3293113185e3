"""What all downloads share."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.weights.errors import SourceFailed, Transient
from services.weights.transfer.pacing import MAX_BACKOFF_S, DownloadLimits, DownloadTools, Pacer
from services.weights.transfer.web import Web


@pytest.fixture
def pauses_s() -> list[float]:
    return []


@pytest.fixture
def tools(tmp_path: Path, pauses_s: list[float]):
    async def sleep(pause_s: float) -> None:
        pauses_s.append(pause_s)

    async def count(size_bytes: int) -> None:
        pass

    with ThreadPoolExecutor(1) as io:
        yield DownloadTools(
            web=Web({}, stall_s=1.0, connections=1, wall_s=lambda: 0.0),
            io=io,
            pacer=Pacer(0, lambda: 0.0, tmp_path / "bandwidth"),
            limits=DownloadLimits(connections=1, piece_bytes=1, slow_bps=0, retries=50),
            parts=tmp_path,
            reserve=lambda size_bytes: None,
            count=count,
            chance=random.Random(0),
            sleep=sleep,
        )


async def test_on_cancellation_a_run_waits_until_its_thread_has_ended(tools):
    """Else files are closed and locks let go of while it still writes."""
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        may_end.wait(10)
        ended.append(True)

    caller = asyncio.create_task(tools.run(work))
    await asyncio.to_thread(begun.wait, 10)
    caller.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended


async def test_back_off_grows_and_stays_bounded_and_the_servers_retry_after_is_obeyed(tools, pauses_s):
    await tools.back_off(1, Transient("busy", retry_after_s=37.0))
    await tools.back_off(1, Transient("busy"))
    await tools.back_off(50, Transient("busy"))
    asked, first, late = pauses_s
    assert asked == 37.0
    assert 0.2 <= first < 1.0
    assert MAX_BACKOFF_S / 2 <= late <= MAX_BACKOFF_S


async def test_a_source_is_left_after_too_many_retries(tools, pauses_s):
    with pytest.raises(SourceFailed):
        await tools.back_off(51, Transient("busy"))
    assert not pauses_s
