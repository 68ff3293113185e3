"""A gateway over stores in memory, running, with one worker of each stage known to it."""

from collections.abc import AsyncIterator

import pytest

from services.gateway.domain.job import DIFFUSION, PREPROCESS
from tests.fakes.fleet import Fleet, FleetWorker


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as running:
        yield running


@pytest.fixture
async def painter(fleet: Fleet) -> FleetWorker:
    worker = fleet.worker(DIFFUSION)
    await worker.come()
    return worker


@pytest.fixture
async def annotator(fleet: Fleet) -> FleetWorker:
    worker = fleet.worker(PREPROCESS)
    await worker.come()
    return worker
