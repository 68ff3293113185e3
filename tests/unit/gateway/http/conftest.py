"""The HTTP application over a fake gateway, called in this process."""

from collections.abc import AsyncIterator

import httpx
import pytest

from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.gateway import FakeGateway
from tests.fakes.memory_blobs import MemoryBlobs


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def options() -> HttpOptions:
    return HttpOptions(json_limit_bytes=100_000, blob_limit_bytes=200_000, form_limit_bytes=400_000)


@pytest.fixture
async def client(gateway: FakeGateway, blobs: MemoryBlobs, options: HttpOptions) -> AsyncIterator[httpx.AsyncClient]:
    app = http_app(gateway, blobs, options)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client
