from collections.abc import AsyncIterator

import pytest

from tests.fakes.scripted_gateway import FakeGateway
from tests.fakes.stage import FakeStage


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    gateway = FakeGateway()
    await gateway.start()
    yield gateway
    await gateway.stop()


@pytest.fixture
def stage() -> FakeStage:
    return FakeStage()
