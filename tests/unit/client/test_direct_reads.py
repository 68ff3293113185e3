"""Images come from the gateway's storage itself where it gives an address, otherwise through the gateway."""

import pytest

from fanlight.blobs.v1 import blobs_pb2_grpc
from fanlight.channel import open_channel
from fanlight.client.blobs import BlobTransfer, digest_of
from fanlight.client.retry import Retry
from tests.fakes.range_server import Fault, RangeServer
from tests.fakes.scripted_gateway import FakeGateway

DATA = bytes(range(256)) * 400
DIGEST = digest_of(DATA)


@pytest.mark.parametrize("instead", [Fault(instead=b"<html>log in"), Fault(flip_at=5), Fault(status=403)])
async def test_what_somebody_else_answers_in_the_storages_stead_is_thrown_away(instead: Fault) -> None:
    with RangeServer() as storage:
        async with FakeGateway() as gateway, open_channel(gateway.address) as channel:
            gateway.blobs[DIGEST], gateway.addresses[DIGEST] = DATA, storage.put("/blob", DATA)
            storage.faults["/blob"] = [instead]
            blobs = BlobTransfer(blobs_pb2_grpc.BlobServiceStub(channel), Retry(connect_s=5.0), scope="default")
            assert [await blobs.read(DIGEST, timeout_s=20.0) for _ in range(2)] == [DATA, DATA]
    assert (gateway.calls["PrepareRead"], gateway.calls["ReadBlob"]) == (1, 2)
