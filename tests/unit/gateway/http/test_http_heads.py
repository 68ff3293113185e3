"""HEAD: the answer to GET, without its body."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.gateway import FakeGateway, a_job
from tests.fakes.http_serving import serving
from tests.fakes.memory_blobs import MemoryBlobs

BYTES = bytes(range(100))
# Other than in the answer to GET by what they mean.
VARYING = {"date"}


@pytest.fixture
async def server(options: HttpOptions) -> AsyncIterator[httpx.AsyncClient]:
    gateway, blobs = FakeGateway(), MemoryBlobs()
    gateway.jobs.change(a_job("1"))
    blobs.put(BYTES)
    async with serving(http_app(gateway, blobs, options)) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


def digest(body: bytes) -> str:
    return MemoryBlobs().put(body).digest


async def answers(server: httpx.AsyncClient, path: str, **headers: str) -> tuple[httpx.Response, httpx.Response]:
    async with asyncio.timeout(10):
        return await server.get(path, headers=headers), await server.head(path, headers=headers)


async def test_head_is_possible_wherever_get_is(server: httpx.AsyncClient) -> None:
    paths = (await server.get("/openapi.json")).json()["paths"]
    gets = [path for path, methods in paths.items() if "get" in methods and not path.endswith("/events")]
    assert len(gets) > 10
    names = {"node_id": "n1", "key_id": "k1", "name": "acme", "job_id": "1", "digest": digest(BYTES), "number": "0"}
    for path in (*(path.format_map({**dict.fromkeys(["bucket", "key"], "x"), **names}) for path in gets), "/docs"):
        got, head = await answers(server, path)
        assert (path, head.status_code) == (path, got.status_code)
        assert head.content == b""
        same = [{k: v for k, v in each.headers.items() if k not in VARYING} for each in (got, head)]
        assert (path, same[1]) == (path, same[0])


async def test_the_head_of_a_stream_of_events_ends(server: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        head = await server.head("/v1/jobs/1/events")
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (await server.get("/healthz")).status_code == 200


@pytest.mark.parametrize(("asked", "status"), [("bytes=10-19", 206), ("bytes=100-", 416), ("bytes=x", 200)])
async def test_the_head_of_a_part_of_a_blob_is_that_of_the_part(
    server: httpx.AsyncClient, asked: str, status: int
) -> None:
    got, head = await answers(server, f"/v1/blobs/{digest(BYTES)}", Range=asked)
    assert (got.status_code, head.status_code, head.content) == (status, status, b"")
    assert head.headers.get("content-range") == got.headers.get("content-range")
    assert head.headers["content-length"] == got.headers["content-length"]


async def test_head_is_refused_where_there_is_no_get(server: httpx.AsyncClient) -> None:
    assert (await server.head("/v1/annotate/canny")).status_code == 405
    assert (await server.head("/v1/nothing")).status_code == 404
