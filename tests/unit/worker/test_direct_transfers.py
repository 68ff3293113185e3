"""Blobs directly from and to the gateway's storage; if anything goes wrong there, through the gateway."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.contract.names import digest_of
from fanlight.errors import NodeFault
from services.worker.blobs import BlobCalls, download, upload
from services.worker.retry import Env, RetryPolicy
from tests.fakes.range_server import Fault, RangeServer
from tests.fakes.scripted_gateway import FakeGateway

DATA = bytes(range(256)) * 400
BLOB = common_pb2.Blob(scope="default", digest=digest_of(DATA), size_bytes=len(DATA))


@pytest.fixture
def answering() -> Iterator[Callable[[int], str]]:
    """Starts a storage that answers every request with the status, and a GET with the bytes too; its address."""
    running: list[HTTPServer] = []

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                assert self.rfile.read(int(self.headers["content-length"])) == DATA
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(DATA)))
                self.end_headers()
                self.wfile.write(DATA)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/bucket/key?signature=1"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 201, 204])
async def test_bytes_that_the_storage_accepted_are_stored(answering: Callable[[int], str], status: int) -> None:
    await upload(answering(status), {}, DATA)


async def test_bytes_that_the_storage_had_before_are_stored_too(answering: Callable[[int], str]) -> None:
    await upload(answering(412), {"if-none-match": "*"}, DATA)


@pytest.mark.parametrize("status", [301, 400, 403, 409, 411, 413, 500, 503])
async def test_any_other_answer_means_that_they_are_not_stored(answering: Callable[[int], str], status: int) -> None:
    with pytest.raises(NodeFault, match=f"refused with {status}"):
        await upload(answering(status), {}, DATA)


@pytest.mark.parametrize("status", [201, 206, 304, 403, 404, 500])
async def test_no_bytes_are_used_of_an_answer_that_is_not_the_whole_blob(
    answering: Callable[[int], str], status: int
) -> None:
    received: list[bytes] = []
    with pytest.raises(NodeFault, match=f"refused with {status}"):
        await download(answering(status), received.append)
    assert received == []


async def test_a_whole_blob_arrives_unchanged(answering: Callable[[int], str]) -> None:
    received: list[bytes] = []
    await download(answering(200), received.append)
    assert b"".join(received) == DATA


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


async def test_a_blob_is_downloaded_from_the_storage_directly(calls: BlobCalls, gateway: FakeGateway) -> None:
    assert await calls.read(BLOB) == DATA
    assert gateway.calls["ReadBlob"] == 0


async def test_a_download_that_breaks_off_is_resumed_through_the_gateway(
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
    assert gateway.calls["PrepareRead"] == asked, "the circuit breaker is open for a while"


async def test_a_gateway_without_such_a_storage_is_not_asked_with_every_blob(
    calls: BlobCalls, gateway: FakeGateway
) -> None:
    gateway.addresses.clear()
    for _ in range(3):
        assert await calls.read(BLOB) == DATA
    assert (gateway.calls["PrepareRead"], gateway.calls["ReadBlob"]) == (1, 3)
