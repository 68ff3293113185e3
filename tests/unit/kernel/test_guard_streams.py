"""Around a handler: streams end with their call, a retry after 0 s is sent, broken strings are named by place."""

import asyncio

import grpc
import grpc.aio
import pytest

from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.errors import ResourceExhausted
from fanlight.queue.v1 import queue_pb2
from services.kernel.config import CommonSettings
from services.kernel.errors_wire import find_broken_string, from_rpc_error
from services.kernel.grpc_server import RpcServer

SERVICE = "fanlight.blobs.v1.BlobService"


class Servicer(blobs_pb2_grpc.BlobServiceServicer):
    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def ReadBlob(self, request, context):
        if request.digest == "full":
            raise ResourceExhausted("try again", retry_after_s=0.0)
        try:
            yield blobs_pb2.ReadBlobResponse(chunk=b"a")
            await asyncio.Event().wait()
        finally:
            self.closed.set()


@pytest.fixture
async def served():
    servicer = Servicer()
    server = RpcServer(
        CommonSettings(drain_grace_s=0),
        services={SERVICE: lambda s: blobs_pb2_grpc.add_BlobServiceServicer_to_server(servicer, s)},
        tokens={},
        default_tokens=(),
    )
    port = server.bind("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, blobs_pb2_grpc.BlobServiceStub(channel)
    await server.stop()


async def test_a_stream_whose_caller_has_gone_is_closed(served):
    servicer, stub = served
    call = stub.ReadBlob(blobs_pb2.ReadBlobRequest(), timeout=30)
    assert (await call.read()).chunk == b"a"
    call.cancel()
    await asyncio.wait_for(servicer.closed.wait(), 30)


async def test_a_retry_after_0_seconds_is_sent(served):
    _, stub = served
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ReadBlob(blobs_pb2.ReadBlobRequest(digest="full"), timeout=30).read()
    assert from_rpc_error(caught.value).retry_after_s == 0.0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_string_that_is_not_utf_8_is_named_with_its_index(place):
    names = [b"\xc3\x28" if number == place else b"good" for number in range(3)]
    descriptor = queue_pb2.Worker.DESCRIPTOR
    field = next(each for each in descriptor.fields if each.is_repeated and each.type == each.TYPE_STRING)
    data = b"".join(_tag(field.number) + bytes([len(name)]) + name for name in names)
    assert find_broken_string(descriptor, data) == f"{field.name}[{place}]"


def _tag(number: int) -> bytes:
    """Of a length-delimited field."""
    key, out = number << 3 | 2, bytearray()
    while key > 127:
        out.append(key & 127 | 128)
        key >>= 7
    return bytes([*out, key])
