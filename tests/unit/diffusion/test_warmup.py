"""What one worker uses of the machine, measured by an image."""

import pytest

from fanlight.errors import NodeFault
from services.diffusion.warmup import STEPS, busy_cores


class Clocks:
    """Each generated image takes a second and `cores` CPU seconds."""

    def __init__(self, cores: float, *, error: Exception | None = None) -> None:
        self.now_s = self.cpu_s = 0.0
        self.steps: list[int] = []
        self._cores, self._error = cores, error

    async def parse(self, request):
        return request

    async def generate(self, request, report):
        self.steps.append(request.steps)
        if self._error:
            raise self._error
        self.now_s += 1.0
        # The first image takes more than later ones.
        self.cpu_s += self._cores * (1 if len(self.steps) > 1 else 9)


async def measured(work: Clocks) -> float:
    return await busy_cores(work, work, clock=lambda: work.now_s, cpu_clock=lambda: work.cpu_s)


@pytest.mark.parametrize("cores", [0.9, 1.7])
async def test_the_cores_are_those_of_the_second_image(cores):
    work = Clocks(cores)

    assert await measured(work) == pytest.approx(cores)
    assert work.steps == [1, STEPS]


@pytest.mark.parametrize("error", [NodeFault("no memory"), TimeoutError()])
async def test_a_worker_that_generates_nothing_still_says_something(error):
    assert await measured(Clocks(4.0, error=error)) <= 1.0
