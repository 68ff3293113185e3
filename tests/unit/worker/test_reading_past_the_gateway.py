"""Input images come directly from the gateway's storage; if anything goes wrong there, through the gateway."""

from collections.abc import AsyncIterator, Iterator

import pytest

from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.contract.digests import digest_of
from services.worker.blobs import BlobCalls
from services.worker.retry import Env, RetryPolicy
from tests.fakes.range_server import Fault, RangeServer
from tests.fakes.scripted_gateway import FakeGateway

DATA = bytes(range(256)) * 400
BLOB = common_pb2.Blob(scope="default", digest=digest_of(DATA), size_bytes=len(DATA))


@pytest.fixture
def storage() -> Iterator[RangeServer]:
    with RangeServer() as server:
        yield server


@pytest.fixture
async def calls(gateway: FakeGateway, storage: RangeServer) -> AsyncIterator[BlobCalls]:
    gateway.blobs[BLOB.digest] = DATA
    gateway.addresses[BLOB.digest] = storage.put("/blob", DATA)
    env = Env()
    async with open_channel(gateway.address) as channel:
        retry = RetryPolicy(env, delay_max_s=0.1, limit_s=10.0)
        yield BlobCalls(channel, retry, env, read_bytes_max=1 << 20)


async def test_a_blob_comes_from_the_storage_itself(calls: BlobCalls, gateway: FakeGateway) -> None:
    assert await calls.read(BLOB) == DATA
    assert gateway.calls["ReadBlob"] == 0


async def test_what_breaks_off_there_goes_on_through_the_gateway(
    calls: BlobCalls, gateway: FakeGateway, storage: RangeServer
) -> None:
    storage.faults["/blob"] = [Fault(cut_after=50_000)]
    assert await calls.read(BLOB) == DATA
    assert gateway.read_offsets[0] > 0


@pytest.mark.parametrize("instead", [Fault(instead=b"<html>log in"), Fault(instead=DATA + DATA), Fault(flip_at=5)])
async def test_wrong_bytes_from_something_in_between_are_discarded(
    calls: BlobCalls, gateway: FakeGateway, storage: RangeServer, instead: Fault
) -> None:
    storage.faults["/blob"] = [instead]
    assert await calls.read(BLOB) == DATA
    assert gateway.read_offsets[-1] == 0
    asked = gateway.calls["PrepareRead"]
    assert await calls.read(BLOB) == DATA
    assert gateway.calls["PrepareRead"] == asked, "that storage is out of reach for a while"


async def test_a_gateway_without_such_a_storage_is_not_asked_with_every_blob(
    calls: BlobCalls, gateway: FakeGateway
) -> None:
    gateway.addresses.clear()
    for _ in range(3):
        assert await calls.read(BLOB) == DATA
    assert (gateway.calls["PrepareRead"], gateway.calls["ReadBlob"]) == (1, 3)
