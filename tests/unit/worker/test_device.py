"""Work that hangs: when that is noticed, and what becomes of the process. Time passes only as the test lets it."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.worker.device import PARTS, DeviceLost, DeviceState, HangLimits, HangWatch
from tests.fakes.hanging import FakeHangWatch

LIMITS = HangLimits(factor=20.0, floor_s=60.0, first_s=600.0)


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def executor(hanging: threading.Event) -> Iterator[ThreadPoolExecutor]:
    executor = ThreadPoolExecutor(1)
    yield executor
    hanging.set()
    executor.shutdown()


def lost() -> DeviceLost:
    return DeviceLost("it has hung").of_part("device:cuda")


@pytest.mark.parametrize(
    ("measured_s", "items", "limit_s"),
    [(None, 1, 600.0), (None, 4, 2_400.0), (0.1, 1, 60.0), (5.0, 1, 100.0), (5.0, 4, 400.0)],
)
def test_the_limit_follows_what_the_work_usually_takes(measured_s: float | None, items: int, limit_s: float) -> None:
    assert LIMITS.limit_s(measured_s, items=items) == limit_s


async def test_work_that_hangs_is_left_after_its_limit(executor: ThreadPoolExecutor, hanging: threading.Event) -> None:
    watch = FakeHangWatch(is_patient=False)
    with pytest.raises(DeviceLost) as caught:
        await watch.run(executor, hanging.wait, limit_s=60.0, lost=lost)
    assert caught.value.part == "device:cuda"
    assert watch.waited_s >= 60.0


async def test_work_that_waits_for_its_turn_has_not_hung(
    executor: ThreadPoolExecutor, hanging: threading.Event
) -> None:
    passed = 0

    async def wait(working: "asyncio.Future[object]", wait_s: float) -> None:
        nonlocal passed
        passed += 1
        if passed > 3 * PARTS:
            hanging.set()
        await asyncio.wait([working], timeout=0 if passed <= 3 * PARTS else 30)

    executor.submit(hanging.wait)
    assert await HangWatch(wait=wait).run(executor, lambda: "done", limit_s=60.0, lost=lost) == "done"


async def test_time_in_which_the_process_stood_still_is_no_hang(
    executor: ThreadPoolExecutor, hanging: threading.Event
) -> None:
    """A laptop slept for a day: one part of the limit is over, whatever the clock says, and the work goes on."""

    async def wait(working: "asyncio.Future[object]", wait_s: float) -> None:
        hanging.set()
        await asyncio.wait([working], timeout=30)

    assert await HangWatch(wait=wait).run(executor, hanging.wait, limit_s=0.0, lost=lost)


async def test_a_cancelled_work_that_hangs_is_left_as_well(
    executor: ThreadPoolExecutor, hanging: threading.Event
) -> None:
    watch, stops = FakeHangWatch(), []
    begun = threading.Event()

    def work() -> None:
        begun.set()
        hanging.wait()

    running = asyncio.create_task(
        watch.run(executor, work, limit_s=60.0, lost=lost, on_cancel=lambda: stops.append(True))
    )
    await asyncio.to_thread(begun.wait, 30)
    running.cancel()
    await asyncio.sleep(0)
    watch.hurry()
    with pytest.raises(DeviceLost):
        await running
    assert stops == [True]


async def test_the_error_of_work_that_ends_is_its_own(executor: ThreadPoolExecutor) -> None:
    with pytest.raises(ZeroDivisionError):
        await HangWatch().run(executor, lambda: 1 // 0, limit_s=60.0, lost=lost)


async def test_the_first_error_of_a_lost_device_counts() -> None:
    device = DeviceState()
    waiting = asyncio.create_task(device.wait_lost())
    await asyncio.sleep(0)
    device.lose(DeviceLost("first"))
    device.lose(DeviceLost("second"))
    assert (await waiting).message == "first"
