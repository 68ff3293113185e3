from collections.abc import AsyncIterator

import pytest

from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with FakeGateway() as gateway:
        yield gateway


@pytest.fixture
def stage() -> FakeStage:
    return FakeStage()
