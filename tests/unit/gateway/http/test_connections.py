"""Connections that prove nothing, on a real socket: deadlines, limits by address, and who is served meanwhile."""

import asyncio
import contextlib
import socket
import ssl

import httpx
import pytest
import trustme

from services.gateway.app.tenants import Caller, Callers
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.http.connections import ConnectionLimits
from tests.fakes.gateway import FakeGateway
from tests.fakes.http_serving import serving
from tests.fakes.memory_blobs import MemoryBlobs

HALF = b"GET /v1/jobs HTTP/1.1\r\nX: a"
TOKEN = {"Authorization": "Bearer right"}
LIMITS = ConnectionLimits(unproven_per_address=4, unproven=8, head_s=30.0, handshake_s=30.0)


def an_app(**options):
    callers = Callers({"right": Caller(tenant="acme")})
    return http_app(FakeGateway(), MemoryBlobs(), HttpOptions(callers=callers, **options))


async def opened(url, source, sent=HALF):
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(sent)
    return reader, writer


async def rest_of(connection):
    """All until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(30):
            while chunk := await connection[0].read(10_000):
                data += chunk
    return data


async def is_open(connection):
    try:
        async with asyncio.timeout(0.1):
            return bool(await connection[0].read(1))
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def close_all(connections):
    for _, writer in connections:
        writer.close()


async def ask(url, path="/v1/jobs", headers=TOKEN, **client):
    async with httpx.AsyncClient(base_url=url, timeout=30, **client) as http:
        return (await http.get(path, headers=headers)).status_code


async def test_the_oldest_of_an_address_gives_way_and_other_addresses_keep_theirs():
    async with serving(an_app(), limits=LIMITS) as url:
        other = await opened(url, "127.0.0.3")
        strangers = [await opened(url, "127.0.0.2") for _ in range(6)]
        assert await rest_of(strangers[0]) == await rest_of(strangers[1]) == b""
        assert [await is_open(each) for each in (*strangers[2:], other)] == [True] * 5
        close_all([other, *strangers])


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
async def test_everybody_is_served_beside_half_requests_also_from_the_same_address(source):
    async with serving(an_app(), limits=LIMITS) as url:
        strangers = [await opened(url, source) for _ in range(40)]
        assert [await ask(url, path, headers={}) for path in ("/healthz", "/readyz")] == [200, 200]
        assert await ask(url) == 200
        close_all(strangers)


async def test_a_connection_that_proved_a_token_stays():
    async with serving(an_app(), limits=LIMITS) as url, httpx.AsyncClient(base_url=url, timeout=30) as tenant:
        first = await tenant.get("/v1/jobs", headers=TOKEN)
        strangers = [await opened(url, "127.0.0.1") for _ in range(20)]
        assert await rest_of(strangers[0]) == b""
        second = await tenant.get("/v1/jobs", headers=TOKEN)
        streams = [each.extensions["network_stream"].get_extra_info("client_addr") for each in (first, second)]
        assert streams[0] == streams[1]
        close_all(strangers)


async def test_a_wrong_token_proves_nothing():
    wrong = b"GET /v1/jobs HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer wrong\r\n\r\n"
    async with serving(an_app(), limits=LIMITS) as url:
        strangers = [await opened(url, "127.0.0.2", wrong) for _ in range(5)]
        assert b"401" in await rest_of(strangers[0])
        close_all(strangers)


async def test_of_too_many_proven_connections_the_one_that_idles_longest_is_closed():
    limits = ConnectionLimits(proven=2)
    whole = b"GET /v1/jobs HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer right\r\n\r\n"
    async with serving(an_app(), limits=limits) as url:
        held = []
        for _ in range(3):
            held.append(await opened(url, "127.0.0.1", whole))
            assert (await held[-1][0].readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert b"jobs" in await rest_of(held[0])
        assert await is_open(held[2])
        close_all(held)


@pytest.mark.parametrize("sent", [b"G", HALF, b"GET / HTTP/1.1\r\nHost: a\r\n", b"\r\n"])
async def test_a_head_that_does_not_arrive_is_answered_and_closed(sent):
    async with serving(an_app(), limits=ConnectionLimits(head_s=0.2)) as url:
        answer = await rest_of(await opened(url, "127.0.0.2", sent))
        assert answer.startswith(b"HTTP/1.1 408") or sent == b"\r\n"
        assert b"did not arrive within 0.2 s" in answer or sent == b"\r\n"


async def test_silence_is_closed_without_an_answer():
    async with serving(an_app(), limits=ConnectionLimits(head_s=0.2)) as url:
        assert await rest_of(await opened(url, "127.0.0.2", b"")) == b""


async def test_dripping_a_head_does_not_extend_its_deadline():
    async with serving(an_app(), limits=ConnectionLimits(head_s=0.3)) as url:
        reader, writer = await opened(url, "127.0.0.2")

        async def drip():
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert (await rest_of((reader, writer))).startswith(b"HTTP/1.1 408")
        dripping.cancel()


async def test_the_head_of_a_later_request_has_the_same_deadline():
    whole = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(an_app(), limits=ConnectionLimits(head_s=0.3)) as url:
        reader, writer = await opened(url, "127.0.0.2", whole)
        await reader.readuntil(b'"alive"}')
        # Between requests there is none.
        await asyncio.sleep(0.5)
        writer.write(whole)
        await reader.readuntil(b'"alive"}')
        writer.write(b"GET /")
        assert (await rest_of((reader, writer))).startswith(b"HTTP/1.1 408")


async def test_a_body_that_drips_is_refused():
    head = b"POST /v1/blobs HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer right\r\nContent-Length: 1000\r\n\r\n"
    app = an_app(body_idle_s=0.4, linger_idle_s=0.1)
    async with serving(app) as url:
        reader, writer = await opened(url, "127.0.0.1", head)

        async def drip():
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        assert (await asyncio.wait_for(reader.readline(), 30)).startswith(b"HTTP/1.1 504")
        assert b"slower than 8,000 bit/s" in await asyncio.wait_for(reader.readuntil(b"}}"), 30)
        dripping.cancel()
        writer.close()


@pytest.mark.parametrize(
    "garbage",
    [b"\0\xff\x16\x03\x01" * 10 + b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"a b\r\n\r\n"],
)
async def test_garbage_is_refused_and_closed_also_behind_a_request(garbage):
    whole = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(an_app()) as url:
        assert b"INVALID_FIELD" in await rest_of(await opened(url, "127.0.0.2", garbage))
        answers = await rest_of(await opened(url, "127.0.0.2", whole * 3 + garbage))
        assert answers.count(b"alive") == 3
        assert await ask(url) == 200


async def test_garbage_in_a_body_ends_that_connection_alone():
    chunked = b"POST /v1/blobs HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer right\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(an_app()) as url:
        reader, writer = await opened(url, "127.0.0.2", chunked)
        await asyncio.sleep(0.05)
        writer.write(b"zz\r\n\r\n")
        await rest_of((reader, writer))
        assert await ask(url) == 200


async def test_two_authorizations_are_refused():
    twice = [("Authorization", "Bearer right"), ("Authorization", "Bearer right")]
    async with serving(an_app()) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        answer = await client.get("/v1/jobs", headers=twice)
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "send one `Authorization` header; this request has 2"


async def test_health_and_metrics_answer_when_all_places_are_taken():
    async with serving(an_app(requests_limit=0)) as url:
        assert await ask(url) == 429
        assert await ask(url, "/healthz", headers={}) == 200
        assert await ask(url, "/metrics", headers={}) == 401


@pytest.fixture
def tls(tmp_path):
    """Settings of a server with TLS, and a client's context."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return {"tls_cert_file": tmp_path / "cert", "tls_key_file": tmp_path / "key"}, context


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@pytest.mark.parametrize("sent", [b"", HELLO])
async def test_half_handshakes_give_way_and_everybody_is_served(tls, sent):
    settings, context = tls
    async with serving(an_app(), limits=LIMITS, **settings) as url:
        strangers = [await opened(url, "127.0.0.1", sent) for _ in range(20)]
        assert await rest_of(strangers[0]) == b""
        assert await ask(url.replace("http:", "https:"), verify=context) == 200
        close_all(strangers)


async def test_a_handshake_has_a_deadline(tls):
    settings, context = tls
    async with serving(an_app(), limits=ConnectionLimits(handshake_s=0.3), **settings) as url:
        await rest_of(await opened(url, "127.0.0.2", HELLO))
        assert await ask(url.replace("http:", "https:"), verify=context) == 200


async def test_a_server_that_is_out_of_files_makes_room(monkeypatch):
    async with serving(an_app(), limits=LIMITS) as url:
        strangers = [await opened(url, "127.0.0.2") for _ in range(3)]
        await asyncio.sleep(0.05)
        loop, failures = asyncio.get_running_loop(), 1
        accept = loop.sock_accept

        async def failing(listening: socket.socket):
            nonlocal failures
            if failures:
                failures -= 1
                raise OSError(24, "Too many open files")
            return await accept(listening)

        monkeypatch.setattr(loop, "sock_accept", failing, raising=False)
        # The accept that already waits takes the first; the next one fails.
        assert await ask(url) == 200
        assert await rest_of(strangers[0]) == b""
        assert await is_open(strangers[2])
        assert await ask(url) == 200
        close_all(strangers)
