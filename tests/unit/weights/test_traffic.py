"""A day's cap on bytes: when it is reached, and when the next day begins."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.weights.errors import DailyCapReached
from services.weights.store.index import Index
from services.weights.transfer.pacing import COUNT_STEP_BYTES, DAY_S, Traffic

MIB = 1024 * 1024


@pytest.fixture
def traffic(tmp_path: Path):
    with ThreadPoolExecutor(1) as io:
        yield lambda daily_bytes, now_s: Traffic(
            Index(tmp_path / "index.sqlite").add_traffic, io, daily_bytes, lambda: now_s
        )


async def test_a_reached_cap_reports_when_the_next_day_begins(traffic) -> None:
    with pytest.raises(DailyCapReached, match=r"the cap is 1048576") as caught:
        await traffic(MIB, 10 * DAY_S + 82_800.0).count(MIB)
    assert caught.value.retry_after_s == 3_600.0


async def test_what_other_processes_fetched_today_counts_and_yesterdays_does_not(traffic) -> None:
    await traffic(0, 10 * DAY_S - 1.0).count(2 * COUNT_STEP_BYTES)
    today = traffic(4 * MIB, 10 * DAY_S + 1.0)
    await today.count(3 * MIB)
    await traffic(0, 10 * DAY_S + 2.0).count(COUNT_STEP_BYTES)
    with pytest.raises(DailyCapReached):
        await today.count(MIB)


async def test_small_steps_reach_the_cap_too(traffic) -> None:
    counted = traffic(MIB, 0.0)
    for _ in range(63):
        await counted.count(MIB // 64)
    with pytest.raises(DailyCapReached):
        await counted.count(MIB // 64)


async def test_without_a_cap_bytes_are_only_counted(traffic) -> None:
    counted = traffic(0, 0.0)
    await counted.count(COUNT_STEP_BYTES)
    await counted.count(5)
    assert await counted.flush() == COUNT_STEP_BYTES + 5
