import random
from collections.abc import Iterator

import pytest

from services.weights.settings import WeightsSettings
from tests.fakes.range_server import RangeServer
from tests.fakes.weight_stores import open_store


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with RangeServer() as server:
        yield server


@pytest.fixture
def body() -> bytes:
    return random.Random(7).randbytes(5_000_000)


@pytest.fixture
def settings(server, tmp_path):
    def make(**values):
        defaults = {
            "dir": tmp_path / "store",
            "hf_endpoint": server.url,
            "civitai_endpoint": server.url,
            "retries": 2,
        }
        return WeightsSettings(**{**defaults, **values})

    return make


@pytest.fixture
async def store(settings):
    async with open_store(settings()) as store:
        yield store
