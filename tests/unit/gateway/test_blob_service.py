"""BlobService over real gRPC on loopback."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import grpc
import pytest

from fanlight import errors
from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.channel import open_channel
from fanlight.contract.names import digest_of
from services.gateway.app.tenants import Callers, Tenant, callers_of
from services.gateway.ports import Upload
from services.gateway.rpc.blobs import CHUNK_OUT_BYTES
from services.kernel.config import CommonSettings
from services.kernel.errors_wire import from_rpc_error
from services.kernel.grpc_server import RpcServer
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.principals import blobs_of_clients

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100
Stub = blobs_pb2_grpc.BlobServiceStub
Request = blobs_pb2.WriteBlobRequest


@pytest.fixture
async def blobs() -> MemoryBlobs:
    return MemoryBlobs(blob_limit_bytes=2_000_000)


@asynccontextmanager
async def serving(blobs: MemoryBlobs, callers: Callers) -> AsyncIterator[str]:
    """Its address."""

    def add(server: grpc.aio.Server) -> None:
        blobs_pb2_grpc.add_BlobServiceServicer_to_server(blobs_of_clients(blobs, callers), server)

    server = RpcServer(
        CommonSettings(drain_grace_s=0), services={"fanlight.blobs.v1.BlobService": add}, tokens={}, default_tokens=()
    )
    port = server.bind("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop()


@pytest.fixture
async def stub(blobs: MemoryBlobs) -> AsyncIterator[Stub]:
    async with serving(blobs, Callers()) as address, open_channel(address) as channel:
        yield blobs_pb2_grpc.BlobServiceStub(channel)


def writing(*chunks: bytes, **header: str | int) -> AsyncIterator[Request]:
    return requests(Request(header=blobs_pb2.WriteBlobHeader(**header)), *(Request(chunk=chunk) for chunk in chunks))


async def requests(*messages: Request) -> AsyncIterator[Request]:
    for message in messages:
        yield message


async def refused(call: Awaitable[object]) -> errors.FanlightError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def read(stub: Stub, **request: str | int) -> list[blobs_pb2.ReadBlobResponse]:
    return [response async for response in stub.ReadBlob(blobs_pb2.ReadBlobRequest(**request))]


async def test_a_blob_goes_in_and_comes_out_in_chunks(stub: Stub) -> None:
    data = bytes(range(256)) * 4_000
    written = await stub.WriteBlob(writing(data[:600_000], data[600_000:], digest=digest_of(data)))
    first, *rest = await read(stub, digest=written.blob.digest)
    assert first.blob == written.blob
    assert (first.blob.scope, first.blob.size_bytes) == ("default", len(data))
    assert b"".join(response.chunk for response in rest) == data
    assert all(len(response.chunk) <= CHUNK_OUT_BYTES for response in rest)


async def test_a_part_is_read(stub: Stub, blobs: MemoryBlobs) -> None:
    info = blobs.put(PNG)
    _, part = await read(stub, digest=info.digest, offset_bytes=1, limit_bytes=3)
    assert part.chunk == b"PNG"


async def test_only_the_kept_ones_are_had(stub: Stub, blobs: MemoryBlobs) -> None:
    absent = digest_of(b"absent")
    info = blobs.put(PNG)
    answer = await stub.HasBlobs(blobs_pb2.HasBlobsRequest(digests=[absent, info.digest]))
    assert list(answer.digests) == [info.digest]


async def test_bytes_before_the_header_are_refused(stub: Stub) -> None:
    error = await refused(stub.WriteBlob(requests(Request(chunk=b"x"))))
    assert (type(error), error.field) == (errors.InvalidField, "header")


async def test_no_message_at_all_is_refused(stub: Stub) -> None:
    assert (await refused(stub.WriteBlob(requests()))).field == "header"


async def test_a_second_header_is_refused(stub: Stub, blobs: MemoryBlobs) -> None:
    header = Request(header=blobs_pb2.WriteBlobHeader())
    assert (await refused(stub.WriteBlob(requests(header, Request(chunk=b"x"), header)))).field == "chunk"
    assert blobs.used_bytes == 0


async def test_a_chunk_above_its_limit_is_refused(stub: Stub) -> None:
    error = await refused(stub.WriteBlob(writing(bytes(1024 * 1024 + 1))))
    assert (type(error), error.field) == (errors.TooLarge, "chunk")


async def test_a_blob_above_its_limit_is_refused_and_the_next_call_works(stub: Stub) -> None:
    error = await refused(stub.WriteBlob(writing(*[bytes(1_000_000)] * 5)))
    assert isinstance(error, errors.TooLarge)
    assert (await stub.WriteBlob(writing(PNG))).blob.media_type == "image/png"


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"digest": "md5:12"}, "header.digest"),
        ({"digest": digest_of(b"other")}, "digest"),
        ({"size_bytes": 7}, "size_bytes"),
        ({"size_bytes": -1}, "header.size_bytes"),
        ({"scope": "../up"}, "header.scope"),
    ],
)
async def test_a_wrong_header_is_named(stub: Stub, header: dict[str, str | int], field: str) -> None:
    error = await refused(stub.WriteBlob(writing(PNG, **header)))
    assert (type(error), error.field) == (errors.InvalidField, field)


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        ({"digest": digest_of(b"absent")}, errors.NotFound),
        ({"digest": "nonsense"}, errors.InvalidField),
        ({"digest": digest_of(PNG), "offset_bytes": 10_000}, errors.OutOfRange),
        ({"digest": digest_of(PNG), "offset_bytes": -1}, errors.InvalidField),
        ({"digest": digest_of(PNG), "scope": "elsewhere"}, errors.NotFound),
    ],
)
async def test_a_wrong_read_is_refused(
    stub: Stub, blobs: MemoryBlobs, request_: dict[str, str | int], wanted: type[errors.FanlightError]
) -> None:
    blobs.put(PNG)
    with pytest.raises(grpc.RpcError) as caught:
        await read(stub, **request_)
    assert type(from_rpc_error(caught.value)) is wanted


async def test_more_digests_than_the_limit_are_refused(stub: Stub) -> None:
    error = await refused(stub.HasBlobs(blobs_pb2.HasBlobsRequest(digests=[digest_of(b"")] * 1_001)))
    assert (type(error), error.field) == (errors.TooLarge, "digests")


class BucketBlobs(MemoryBlobs):
    async def prepare_upload(self, scope: str, digest: str, size_bytes: int) -> Upload:
        return Upload(url=f"https://bucket.example/{scope}/{digest}", headers={})

    async def prepare_read(self, scope: str, digest: str) -> str:
        if await self.stat(scope, digest) is None:
            raise errors.NotFound("no such blob")
        return f"https://bucket.example/{scope}/{digest}"


async def test_a_tenant_comes_to_its_own_blobs_alone_whatever_it_asks() -> None:
    blobs = BucketBlobs()
    digest = blobs.put(PNG, scope="acme").digest
    callers = callers_of("operator", [Tenant(name="acme", token="a" * 20), Tenant(name="globex", token="g" * 20)])
    async with serving(blobs, callers) as address:
        async with open_channel(address, token="a" * 20) as channel:
            acme = blobs_pb2_grpc.BlobServiceStub(channel)
            assert (await acme.HasBlobs(blobs_pb2.HasBlobsRequest(digests=[digest]))).digests == [digest]
            answer = await acme.PrepareRead(blobs_pb2.PrepareReadRequest(digest=digest))
            assert answer.url == f"https://bucket.example/acme/{digest}"
        async with open_channel(address, token="g" * 20) as channel:
            globex = blobs_pb2_grpc.BlobServiceStub(channel)
            assert not (await globex.HasBlobs(blobs_pb2.HasBlobsRequest(digests=[digest]))).digests
            upload = await globex.PrepareUpload(blobs_pb2.PrepareUploadRequest(digest=digest, size_bytes=1))
            assert "/globex/" in upload.url
            for scope in ("", "acme"):
                for call in (
                    globex.PrepareRead(blobs_pb2.PrepareReadRequest(scope=scope, digest=digest)),
                    anext(aiter(globex.ReadBlob(blobs_pb2.ReadBlobRequest(scope=scope, digest=digest)))),
                ):
                    assert isinstance(await refused(call), errors.NotFound)
            for call in (
                globex.HasBlobs(blobs_pb2.HasBlobsRequest(scope="acme", digests=[digest])),
                globex.PrepareUpload(blobs_pb2.PrepareUploadRequest(scope="acme", digest=digest, size_bytes=1)),
                globex.WriteBlob(writing(PNG, scope="acme")),
            ):
                assert isinstance(await refused(call), errors.NotFound)
