"""What only a real server on a real socket shows: bodies cut in the middle, floods, draining, both kinds of IP."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from fanlight.contract.names import digest_of
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.http.serving import HEADER_LIMIT_BYTES, bind_http, port_of
from services.kernel.config import SettingsError
from tests.fakes.gateway import FakeGateway, a_job
from tests.fakes.http_serving import serving
from tests.fakes.memory_blobs import MemoryBlobs

JOB = json.dumps({"generation": {"prompt": "a teapot"}}).encode()
OPTIONS = HttpOptions(
    json_limit_bytes=100_000, blob_limit_bytes=100_000, form_limit_bytes=200_000, body_idle_s=0.3, linger_idle_s=0.2
)
HUNDRED_MB = 100_000_000


@dataclass(frozen=True)
class Server:
    url: str
    gateway: FakeGateway
    blobs: MemoryBlobs
    stop: asyncio.Event

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    async def is_fine(self) -> None:
        async with httpx.AsyncClient(base_url=self.url) as client:
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.post("/v1/blobs", content=b"next")).status_code == 201


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    gateway, blobs, stop = FakeGateway(), MemoryBlobs(blob_limit_bytes=OPTIONS.blob_limit_bytes), asyncio.Event()
    async with serving(http_app(gateway, blobs, OPTIONS), stop=stop) as url:
        yield Server(url, gateway, blobs, stop)


def head(path: str, content_type: str, **headers: object) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", f"Content-Type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


async def exchange(server: Server, sent: bytes, *, cut: bool = False) -> bytes:
    """What the server answers to the bytes until it closes; `cut` closes our side after them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        async with asyncio.timeout(10):
            writer.write(sent)
            await writer.drain()
            if cut:
                writer.write_eof()
            return await read_all(reader)
    finally:
        writer.close()


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Until the server closes, be it with bytes of ours unread, which the system answers with a reset."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            data += chunk
    return data


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        ("/v1/jobs", "application/json", JOB[:10]),
        ("/v1/jobs", "application/json", b""),
        ("/v1/jobs", "multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="job"\r\n\r\n{'),
        ("/v1/blobs", "image/png", b"\x89PNG\r\n\x1a\n"),
        ("/v1/annotate/canny", "image/png", b"\x89PNG\r\n\x1a\n"),
    ],
)
async def test_a_body_cut_in_the_middle_leaves_nothing(
    server: Server, path: str, content_type: str, body: bytes
) -> None:
    await exchange(server, head(path, content_type, Content_Length=1_000) + body, cut=True)
    assert not server.gateway.jobs.created
    assert server.blobs.used_bytes == 0
    await server.is_fine()


async def test_chunks_cut_in_the_middle_leave_nothing(server: Server) -> None:
    await exchange(server, head("/v1/blobs", "image/png", Transfer_Encoding="chunked") + b"8\r\n12345678\r\n", cut=True)
    assert server.blobs.used_bytes == 0
    await server.is_fine()


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/blobs", "/v1/annotate/canny"])
async def test_a_hundred_megabytes_are_refused_on_their_announcement(server: Server, path: str) -> None:
    answer = await exchange(server, head(path, "application/json", Content_Length=HUNDRED_MB))
    assert status_of(answer) == 413
    assert b"TOO_LARGE" in answer
    await server.is_fine()


async def test_a_client_that_sends_too_much_at_once_reads_why_that_is(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        response = await client.post("/v1/jobs", json={"generation": {"prompt": "x" * 20_000_000}})
        assert (response.status_code, response.json()["error"]["field"]) == (413, "body")
        assert (await client.post("/v1/blobs", content=b"next")).status_code == 201


async def test_a_client_that_asks_before_it_sends_is_told_not_to(server: Server) -> None:
    sent = head("/v1/blobs", "image/png", Content_Length=HUNDRED_MB, Expect="100-continue")
    assert status_of(await exchange(server, sent)) == 413


@pytest.mark.parametrize("expect", [{}, {"Expect": "100-continue"}])
async def test_a_form_whose_file_is_too_large_is_told_by_its_part(server: Server, expect: dict[str, str]) -> None:
    async with httpx.AsyncClient(base_url=server.url, headers=expect, timeout=10) as client:
        response = await client.post("/v1/blobs", files={"photo": ("p.png", bytes(150_000))})
        assert (response.status_code, response.json()["error"]["field"]) == (413, "photo")


@pytest.mark.parametrize("headers", [{}, {"Expect": "100-continue"}])
async def test_an_endless_body_is_answered_while_it_comes(server: Server, headers: dict[str, str]) -> None:
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head("/v1/blobs", "image/png", Transfer_Encoding="chunked", **headers))
    answering = asyncio.create_task(reader.readuntil(b"}}"))
    try:
        async with asyncio.timeout(10):
            while not answering.done():
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(0)
        assert b" 413 " in answering.result()
    finally:
        answering.cancel()
        writer.close()
    assert server.blobs.used_bytes == 0
    await server.is_fine()


async def test_a_body_that_stops_coming_is_given_up(server: Server) -> None:
    answer = await exchange(server, head("/v1/jobs", "application/json", Content_Length=1_000) + b"{")
    assert status_of(answer) == 504
    assert b"DEADLINE_EXCEEDED" in answer
    await server.is_fine()


async def test_headers_above_the_limit_are_refused(server: Server) -> None:
    sent = head("/v1/jobs", "application/json", X_Flood="x" * (2 * HEADER_LIMIT_BYTES))
    assert status_of(await exchange(server, sent)) in (400, 431)
    await server.is_fine()


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"hello\r\n\r\n"]
)
async def test_what_is_not_http_is_refused(server: Server, sent: bytes) -> None:
    await exchange(server, sent, cut=True)
    await server.is_fine()


async def test_a_large_blob_goes_in_and_out_whole(server: Server) -> None:
    data = bytes(range(256)) * 390
    async with httpx.AsyncClient(base_url=server.url) as client:
        assert (await client.post("/v1/blobs", content=data)).status_code == 201
        assert (await client.get(f"/v1/blobs/{digest_of(data)}")).content == data
        part = await client.get(f"/v1/blobs/{digest_of(data)}", headers={"range": "bytes=99839-"})
        assert (part.status_code, part.content) == (206, b"\xff")


async def test_draining_ends_event_streams_and_frees_the_port(server: Server) -> None:
    server.gateway.jobs.change(a_job("1"))
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        async with client.stream("GET", "/v1/jobs/1/events") as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("retry")
            server.gateway.jobs.stop()
            server.stop.set()
            async with asyncio.timeout(10):
                async for _ in lines:
                    pass
        async with asyncio.timeout(10):
            while True:
                try:
                    await client.get("/healthz")
                except httpx.TransportError:
                    break


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::]:0", "0.0.0.0:0"])
async def test_ipv4_reaches_it_however_it_was_named(address: str) -> None:
    if address.startswith("[") and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    app = http_app(FakeGateway(), MemoryBlobs(), OPTIONS)
    async with serving(app, address=address) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/healthz")).status_code == 200


async def test_a_port_that_is_taken_is_told() -> None:
    (taken,) = bind_http("127.0.0.1:0")
    with taken, pytest.raises(SettingsError, match="cannot listen"):
        bind_http(f"127.0.0.1:{port_of([taken])}")
