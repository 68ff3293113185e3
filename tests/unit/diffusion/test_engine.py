"""Images join, leave, fail and are cancelled, each for itself."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from fanlight.errors import NodeFault
from services.diffusion.engine.engine import CLASSES_LIMIT, DeviceThread, DiffusionEngine, StepTimes
from services.worker.device import DeviceLost
from tests.fakes.backend import FakeBackend
from tests.fakes.hanging import FakeHangWatch

LIMIT_S = 30


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def engine(backend: FakeBackend) -> AsyncIterator[DiffusionEngine]:
    thread = DeviceThread()
    engine = DiffusionEngine(lambda: backend, thread=thread, rows_limit=4, hold_limit_s=0.0, clock=lambda: 0.0)
    running = asyncio.create_task(engine.run())
    yield engine
    running.cancel()
    await asyncio.wait([running])
    if backend.gate is not None:
        backend.gate.release(1000)
    thread.close()


@pytest.fixture
def generate(engine):
    """Starts generating; the task has its progress in `.heard`."""

    def start(generation):
        heard = []
        task = asyncio.create_task(engine.generate(generation, heard.append))
        task.heard = heard
        return task

    return start


async def until(condition) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what it waits for happens on the device thread
            await asyncio.sleep(0)


async def test_every_step_is_told_and_every_stretch_of_time(asked, generate):
    task = generate(asked(steps=3))
    generating = await task
    assert [(each.step, each.steps) for each in task.heard] == [(1, 3), (2, 3), (3, 3)]
    assert generating.pixels.shape == (64, 64, 3)
    assert [name for name, _ in generating.spans] == ["wait", "load", "prepare", "denoise", "decode"]


async def test_a_newcomer_joins_between_two_evaluations_and_each_leaves_when_done(asked, generate, backend):
    backend.gate = threading.Semaphore(0)
    first = generate(asked(seed=1, steps=2))
    backend.gate.release()
    await until(lambda: len(first.heard) == 1)
    second = generate(asked(seed=2, steps=3))
    backend.gate.release(10)
    await asyncio.gather(first, second)
    # The device may have begun the first's second evaluation before the second came.
    assert backend.batches in ([[1], [1, 2], [2], [2]], [[1], [1], [2], [2], [2]])
    assert backend.loaded == ["tiny", "tiny"]


async def test_images_that_wait_together_are_generated_together(asked, generate, backend):
    tasks = [generate(asked(seed=seed, steps=1)) for seed in range(6)]
    await asyncio.gather(*tasks)
    assert backend.batches == [[0, 1, 2, 3], [4, 5]]


async def test_one_that_must_be_alone_is(asked, generate, backend):
    tasks = [generate(asked(seed=seed, steps=1, alone=seed == 1)) for seed in range(3)]
    await asyncio.gather(*tasks)
    assert backend.batches == [[0, 2], [1]]


async def test_cancelling_takes_an_image_off_the_device_within_a_step(asked, generate, backend):
    backend.gate = threading.Semaphore(0)
    long, other = generate(asked(seed=1, steps=150)), generate(asked(seed=2, steps=3))
    backend.gate.release()
    await until(lambda: other.heard)
    long.cancel()
    backend.gate.release(10)
    await other
    assert long.cancelled()
    assert backend.batches[0] == [1, 2]
    assert backend.batches.count([1, 2]) <= 2
    assert backend.batches[-1] == [2]


async def test_cancelling_one_that_waits_leaves_the_others(asked, generate, backend):
    backend.gate = threading.Semaphore(0)
    first, second, third = (generate(asked(seed=seed, steps=1, width_px=32 + 4 * seed)) for seed in range(3))
    await asyncio.sleep(0)
    second.cancel()
    backend.gate.release(10)
    await asyncio.gather(first, third)
    assert backend.batches == [[0], [2]]


async def test_an_image_that_fails_leaves_its_neighbors(asked, generate, backend):
    backend.errors[1] = NodeFault("the model gave NaN")
    bad, good = generate(asked(seed=1)), generate(asked(seed=2))
    with pytest.raises(NodeFault, match="NaN"):
        await bad
    await good
    assert backend.batches[0] == [1, 2]
    assert backend.batches[-1] == [2]


async def test_an_image_that_is_begun_again_takes_all_of_its_steps(asked, generate, backend):
    backend.again = {1}
    first, second = generate(asked(seed=1, steps=2)), generate(asked(seed=2, steps=2))
    await asyncio.gather(first, second)
    assert backend.begun_again == [1]
    assert [each.step for each in first.heard] == [1, 2]
    assert sum(batch.count(1) for batch in backend.batches) == 3
    assert sum(batch.count(2) for batch in backend.batches) == 2


async def test_a_batch_that_breaks_fails_and_the_next_one_is_generated(asked, generate, backend):
    backend.batch_errors = [RuntimeError("device lost")]
    tasks = [generate(asked(seed=seed)) for seed in (1, 2)]
    for task in tasks:
        with pytest.raises(RuntimeError):
            await task
    await generate(asked(seed=3))
    assert backend.batches[-1] == [3]


async def test_a_device_that_is_lost_fails_who_is_on_it_and_ends_the_engine(asked, backend):
    engine = DiffusionEngine(lambda: backend, thread=DeviceThread(), rows_limit=4, hold_limit_s=0.0, clock=lambda: 0.0)
    backend.batch_errors.append(DeviceLost("gone"))
    running = asyncio.create_task(engine.run())
    assert not engine.is_lost
    with pytest.raises(DeviceLost):
        await engine.generate(asked(), lambda progress: None)
    with pytest.raises(DeviceLost):
        await running
    assert engine.is_lost


async def test_a_model_that_cannot_be_loaded_fails_its_image_alone(asked, generate, backend, monkeypatch):
    def broken(checkpoint, controlnets):
        raise NodeFault("tiny/unet cannot be loaded")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "load", broken)
        with pytest.raises(NodeFault):
            await generate(asked())
    await generate(asked())


async def test_a_device_that_is_lost_over_one_image_fails_all_who_wait_for_it_too(asked, backend, monkeypatch):
    """None would be told otherwise: they would wait for as long as the process lets running calls end."""

    def lost(state):
        raise DeviceLost("gone")

    monkeypatch.setattr(backend, "finish", lost)
    engine = DiffusionEngine(lambda: backend, thread=DeviceThread(), rows_limit=4, hold_limit_s=0.0, clock=lambda: 0.0)
    sizes = (64, 64, 32)
    generates = [
        engine.generate(asked(seed=seed, steps=seed + 1, width_px=size), print) for seed, size in enumerate(sizes)
    ]
    running = asyncio.create_task(engine.run())
    async with asyncio.timeout(LIMIT_S):
        errors = await asyncio.gather(*generates, return_exceptions=True)
    assert all(isinstance(error, DeviceLost) for error in errors)
    with pytest.raises(DeviceLost):
        await running


async def test_an_evaluation_that_hangs_loses_the_device_for_all_who_wait_and_who_come_later(asked, backend):
    watch, lost = FakeHangWatch(), []
    engine = DiffusionEngine(
        lambda: backend,
        thread=DeviceThread(watch),
        rows_limit=4,
        hold_limit_s=0.0,
        clock=lambda: 0.0,
        device_name=lambda: "cuda:a card",
        on_lost=lost.append,
    )
    backend.gate = threading.Semaphore(0)
    running = asyncio.create_task(engine.run())
    heard = []
    generates = [
        asyncio.create_task(engine.generate(asked(seed=seed, steps=3, width_px=size), heard.append))
        for seed, size in enumerate((64, 64, 32))
    ]
    backend.gate.release()
    await until(lambda: len(heard) == 2)
    # The second evaluation never ends.
    watch.hurry()
    async with asyncio.timeout(LIMIT_S):
        errors = await asyncio.gather(*generates, return_exceptions=True)
    with pytest.raises(DeviceLost):
        await running
    with pytest.raises(DeviceLost):
        await engine.generate(asked(), print)
    assert {(type(error), error.part) for error in errors} == {(DeviceLost, "device:cuda:a_card")}
    assert [error.part for error in lost] == ["device:cuda:a_card"]
    assert watch.waited_s >= 0.9 * watch.limits.floor_s
    backend.gate.release(1000)


async def test_a_load_that_hangs_loses_the_device_though_no_image_waits(catalog, backend, monkeypatch):
    watch, lost, hangs = FakeHangWatch(is_patient=False), [], threading.Event()
    monkeypatch.setattr(backend, "load", lambda *_: hangs.wait())
    engine = DiffusionEngine(
        lambda: backend,
        thread=DeviceThread(watch),
        rows_limit=4,
        hold_limit_s=0.0,
        clock=lambda: 0.0,
        on_lost=lost.append,
    )
    with pytest.raises(DeviceLost):
        await engine.load(catalog.default())
    assert len(lost) == 1
    assert watch.waited_s >= watch.limits.first_s
    hangs.set()


@pytest.mark.parametrize(("takes_s", "rows", "limit_s"), [(0.1, 1, 60.0), (9.0, 1, 180.0), (9.0, 2, 360.0)])
async def test_the_limit_of_an_evaluation_follows_the_measured_ones(asked, backend, takes_s, rows, limit_s):
    limits = []

    class Thread(DeviceThread):
        async def attempt(self, work, *, limit_s):
            limits.append(limit_s)
            return await super().attempt(work, limit_s=limit_s)

    engine = DiffusionEngine(lambda: backend, thread=Thread(), rows_limit=4, hold_limit_s=0.0, clock=lambda: 0.0)
    entry = asked().checkpoint
    engine.step_times.note(entry.base, 12, takes_s)
    running = asyncio.create_task(engine.run())
    await asyncio.gather(*(engine.generate(asked(seed=seed, steps=1), print) for seed in range(rows)))
    assert limit_s in limits
    # What is not an evaluation may load and compile.
    assert set(limits) == {limit_s, 600.0}
    running.cancel()


class Clock:
    """Each evaluation takes `takes_s`."""

    def __init__(self) -> None:
        self.takes_s = 0.0
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def timed(backend, monkeypatch):
    """An engine's step times, and what generates an image whose evaluations take so long."""
    clock, advance = Clock(), backend.advance

    def slow(states):
        clock.now_s += clock.takes_s
        return advance(states)

    monkeypatch.setattr(backend, "advance", slow)
    thread = DeviceThread()
    engine = DiffusionEngine(
        lambda: backend, thread=thread, rows_limit=4, hold_limit_s=0.0, clock=clock, family_of=lambda entry: "tiny"
    )

    async def generate(generation, takes_s: float) -> None:
        clock.takes_s = takes_s
        await engine.generate(generation, lambda progress: None)

    running = asyncio.create_task(engine.run())
    yield engine.step_times, generate
    running.cancel()
    await asyncio.wait([running])
    thread.close()


async def test_a_large_image_does_not_change_what_small_ones_take(asked, timed):
    times, generate = timed
    await generate(asked(steps=5), 0.5)
    await generate(asked(steps=5, width_px=1024, height_px=1024), 20.0)
    assert [(time.family, time.size_class, time.mean_s, time.deviation_s) for time in times] == [
        ("tiny", 12, 0.5, 0.0),
        ("tiny", 20, 20.0, 0.0),
    ]


async def test_a_step_time_is_a_mean_with_a_deviation(asked, timed):
    times, generate = timed
    await generate(asked(steps=1), 1.0)
    await generate(asked(steps=1), 2.0)
    [time] = times
    # The latest counts a fifth: 1 + 0.2; the variance 0.8 x 0.2 x 1.
    assert time.mean_s == pytest.approx(1.2)
    assert time.deviation_s == pytest.approx(0.4)


def test_so_many_classes_are_kept_and_the_oldest_is_dropped():
    times = StepTimes()
    for family in range(CLASSES_LIMIT):
        times.note(f"family{family}", 12, 1.0)
    times.note("family0", 12, 1.0)
    times.note("one more", 12, 1.0)
    families = {time.family for time in times}
    assert len(families) == CLASSES_LIMIT
    assert {"family0", "one more"} <= families
    assert "family1" not in families
