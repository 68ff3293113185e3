"""Bodies that are gzip: read within the same limits as others, on a real socket too; other encodings are refused."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator

import httpx
import pytest

from fanlight.contract.names import digest_of
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.gateway import FakeGateway
from tests.fakes.http_serving import serving
from tests.fakes.memory_blobs import MemoryBlobs

JOB = json.dumps({"generation": {"prompt": "a teapot"}}).encode()
BYTES = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 300
JSON = {"content-type": "application/json"}
Client = httpx.AsyncClient


def error_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["field"]


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "identity, gzip"])
async def test_a_job_may_come_as_gzip(client: Client, gateway: FakeGateway, encoding: str) -> None:
    headers = JSON | {"content-encoding": encoding}
    assert (await client.post("/v1/jobs", content=gzip.compress(JOB), headers=headers)).status_code == 201
    assert len(gateway.jobs.created) == 1


async def test_a_blob_is_the_bytes_that_were_compressed(client: Client) -> None:
    body = gzip.compress(BYTES[:9_000]) + gzip.compress(BYTES[9_000:]) + bytes(512)
    written = await client.post("/v1/blobs", content=body, headers={"content-encoding": "gzip"})
    assert written.json()["digest"] == digest_of(BYTES)


async def test_gzip_may_come_in_pieces_of_any_size(client: Client) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        body = gzip.compress(BYTES)
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    written = await client.post("/v1/blobs", content=pieces(), headers={"content-encoding": "gzip"})
    assert written.json()["digest"] == digest_of(BYTES)


async def test_a_form_may_come_as_gzip(client: Client, gateway: FakeGateway) -> None:
    job = json.dumps({"annotation": {"annotator": "canny", "image": {"url": "part:photo"}}})
    form = httpx.Request("POST", "http://x", files={"job": (None, job), "photo": ("p.png", BYTES)})
    headers = {"content-type": form.headers["content-type"], "content-encoding": "gzip"}
    response = await client.post("/v1/jobs", content=gzip.compress(form.read()), headers=headers)
    assert response.status_code == 201
    assert len(gateway.jobs.created) == 1


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/blobs", "/v1/annotate/canny"])
async def test_a_bomb_is_refused_when_it_passes_the_limit(client: Client, blobs: MemoryBlobs, path: str) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 100_000
    response = await client.post(path, content=bomb, headers=JSON | {"content-encoding": "gzip"})
    assert error_of(response) == (413, "body")
    assert blobs.used_bytes == 0


@pytest.mark.parametrize(
    "body", [JOB, gzip.compress(JOB)[:-9], gzip.compress(JOB) + b"rest", zlib.compress(JOB), b"", b"\x1f\x8b"]
)
async def test_what_is_no_gzip_is_refused(client: Client, gateway: FakeGateway, body: bytes) -> None:
    response = await client.post("/v1/jobs", content=body, headers=JSON | {"content-encoding": "gzip"})
    assert error_of(response) == (400, "body")
    assert not gateway.jobs.created


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "br, gzip", "compress"])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs:batch", "/v1/blobs", "/v1/annotate/canny"])
async def test_other_encodings_are_named_with_what_is_read(client: Client, encoding: str, path: str) -> None:
    response = await client.post(path, content=JOB, headers=JSON | {"content-encoding": encoding})
    assert error_of(response) == (415, "Content-Encoding")
    assert response.headers["accept-encoding"] == "gzip, identity"
    assert encoding in response.json()["error"]["message"]


async def ask(url: str, *parts: bytes) -> bytes:
    """The answer to the parts, each sent once the answer has come so far that a line is there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    got = b""
    for number, part in enumerate(parts):
        if number:
            got += await reader.readuntil(b"\r\n\r\n")
        writer.write(part)
    got += await reader.read()
    writer.close()
    return got


@pytest.fixture
async def url(options: HttpOptions) -> AsyncIterator[str]:
    async with serving(http_app(FakeGateway(), MemoryBlobs(), options)) as url:
        yield url


def head(**headers: object) -> bytes:
    lines = ["POST /v1/jobs HTTP/1.1", "Host: gateway", "Connection: close", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


async def test_gzip_is_asked_for_before_it_is_sent(url: str) -> None:
    body = gzip.compress(JOB)
    answer = await ask(url, head(Content_Encoding="gzip", Content_Length=len(body), Expect="100-continue"), body)
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 201 " in answer


async def test_an_encoding_that_is_not_read_is_refused_before_the_body_is_sent(url: str) -> None:
    answer = await ask(url, head(Content_Encoding="br", Content_Length=50_000, Expect="100-continue"))
    assert answer.startswith(b"HTTP/1.1 415 ")


async def test_gzip_may_come_in_http_chunks(url: str) -> None:
    body = gzip.compress(JOB)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5], body[5:]))
    answer = await ask(url, head(Content_Encoding="gzip", Transfer_Encoding="chunked") + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 201 ")
