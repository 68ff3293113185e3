"""What all downloads share."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.weights.pacing import Pacer
from services.weights.targets import Limits, Tools
from services.weights.web import Web


@pytest.fixture
def tools(tmp_path: Path):
    async def count(size_bytes: int) -> None:
        pass

    with ThreadPoolExecutor(1) as io:
        yield Tools(
            web=Web({}, stall_s=1.0, connections=1, wall_s=lambda: 0.0),
            io=io,
            pacer=Pacer(0, lambda: 0.0, tmp_path / "bandwidth"),
            limits=Limits(connections=1, piece_bytes=1, slow_bps=0, retries=0),
            parts=tmp_path,
            reserve=lambda size_bytes: None,
            count=count,
            chance=random.Random(0),
        )


async def test_who_is_cancelled_goes_on_only_when_his_thread_has_ended(tools):
    """Else files are closed and locks let go of while it still writes."""
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        may_end.wait(10)
        ended.append(True)

    asker = asyncio.create_task(tools.run(work))
    await asyncio.to_thread(begun.wait, 10)
    asker.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not asker.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert ended
