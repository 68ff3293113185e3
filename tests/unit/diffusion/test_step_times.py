"""How long an evaluation takes lately, and how far evaluations stray from that, as the engine measures it."""

import asyncio
import math
from collections.abc import Sequence

import pytest

from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.diffusion.engine.ports import StepResult
from tests.fakes.backend import FakeBackend, FakeRequestState

# How much the latest evaluation counts against those before.
WEIGHT = 0.2


class TimedStudio(FakeBackend):
    """Its evaluations take as long as the test says, on a clock that nothing else moves."""

    def __init__(self, durations_s: Sequence[float]) -> None:
        super().__init__()
        self.now_s = 0.0
        self._left_s = list(durations_s)

    def advance(self, states: Sequence[FakeRequestState]) -> list[StepResult]:
        self.now_s += self._left_s.pop(0)
        return super().advance(states)


@pytest.fixture
def measured(asked):
    """The mean and the deviation after evaluations that took so long; `broken`: the first batch fails."""

    async def measure(*durations_s: float, broken: bool = False) -> tuple[float, float]:
        backend, thread = TimedStudio(durations_s), DeviceThread()
        if broken:
            backend.batch_errors.append(RuntimeError("broken"))
        engine = DiffusionEngine(
            lambda: backend, thread=thread, rows_limit=4, hold_limit_s=0.0, clock=lambda: backend.now_s
        )
        running = asyncio.create_task(engine.run())
        async with asyncio.timeout(30):
            if broken:
                with pytest.raises(RuntimeError, match="broken"):
                    await engine.generate(asked(steps=1), lambda progress: None)
            steps = len(durations_s) - broken
            if steps:
                await engine.generate(asked(steps=steps), lambda progress: None)
        running.cancel()
        await asyncio.wait([running])
        thread.close()
        (time,) = engine.step_times
        return time.mean_s, time.deviation_s

    return measure


def weighted(durations_s: Sequence[float]) -> tuple[float, float]:
    """By the definition: the weights are halved not by count but by age, and the first has all that is left."""
    count = len(durations_s)
    weights = [(1 - WEIGHT) ** (count - 1), *(WEIGHT * (1 - WEIGHT) ** (count - 1 - i) for i in range(1, count))]
    mean = sum(weight * each for weight, each in zip(weights, durations_s, strict=True))
    variance = sum(weight * (each - mean) ** 2 for weight, each in zip(weights, durations_s, strict=True))
    return mean, math.sqrt(variance)


async def test_the_first_evaluation_is_the_mean_and_strays_from_nothing(measured):
    assert await measured(2.0) == (2.0, 0.0)


async def test_evaluations_that_take_the_same_time_do_not_stray(measured):
    assert await measured(0.5, 0.5, 0.5, 0.5) == (0.5, 0.0)


@pytest.mark.parametrize("durations_s", [(1.0, 2.0), (2.0, 1.0), (1.0, 3.0, 1.0, 1.0), (0.25, 0.5, 4.0, 0.125, 0.5)])
async def test_the_deviation_is_that_of_the_latest_evaluations_each_counting_less_the_older_it_is(
    measured, durations_s
):
    assert await measured(*durations_s) == pytest.approx(weighted(durations_s))


async def test_one_slow_evaluation_is_forgotten_in_time(measured):
    _, at_once = await measured(1.0, 5.0)
    mean, later = await measured(1.0, 5.0, *[1.0] * 30)
    assert at_once == pytest.approx(1.6)
    assert (mean, later) == (pytest.approx(1.0, abs=0.01), pytest.approx(0.0, abs=0.1))
    assert later > 0


async def test_a_batch_that_breaks_is_not_measured(measured):
    assert await measured(60.0, 1.0, broken=True) == (1.0, 0.0)
