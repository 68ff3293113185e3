"""Webhooks through a proxy, to each address of a name, and never to an address inside."""

import asyncio
import importlib.util
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_network

import pytest
import trustme
import uvloop

from fanlight.errors import FailedPrecondition, Unavailable
from services.gateway.adapters.webhook_http import WebhookHttp
from services.kernel.network import tls_context
from tests.fakes.proxy import FakeProxy

LOOPBACK = (ip_network("127.0.0.0/8"),)
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file")
needs_socks = pytest.mark.skipif(importlib.util.find_spec("socksio") is None, reason="takes socksio")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    tls_context.cache_clear()
    yield
    tls_context.cache_clear()


@pytest.fixture
def proxy():
    with FakeProxy() as proxy:
        yield proxy


@asynccontextmanager
async def target(heads: list[bytes], *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"{}")).partition(b"\r\n")[0])
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, host, 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", pytest.param("socks5", marks=needs_socks)])
async def test_a_webhook_goes_through_the_proxy_which_resolves_the_name(proxy, monkeypatch, scheme):
    heads: list[bytes] = []
    async with target(heads) as port:
        proxy.lead("hooks.invalid", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("all_proxy", proxy.url(scheme))
        assert await WebhookHttp(()).post("http://hooks.invalid/a?b=c", {}, b"{}") == 204
    assert heads == [b"POST /a?b=c HTTP/1.1"]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("scheme", ["http", pytest.param("socks5h", marks=needs_socks)])
def test_a_webhook_over_tls_goes_through_a_tunnel_and_its_certificate_is_checked(monkeypatch, tmp_path, scheme, run):
    run(_posted_over_tls(monkeypatch, tmp_path, scheme))


async def _posted_over_tls(monkeypatch, tmp_path, scheme):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hooks.invalid").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "roots.pem"))
    heads: list[bytes] = []
    with FakeProxy(login="user:pass") as proxy:
        async with target(heads, tls=context) as port:
            proxy.lead("hooks.invalid", f"https://127.0.0.1:{port}")
            monkeypatch.setenv("https_proxy", proxy.url(scheme))
            with pytest.raises(Unavailable, match=r"hooks.invalid shows a certificate .*SSL_CERT_FILE"):
                await WebhookHttp(()).post("https://hooks.invalid/", {}, b"{}")
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "roots.pem"))
            tls_context.cache_clear()
            assert await WebhookHttp(()).post("https://hooks.invalid/", {}, b"{}") == 204
    assert heads == [b"POST / HTTP/1.1"]
    assert set(proxy.asked) == {"hooks.invalid:443"}


@pytest.mark.parametrize("url", ["http://10.0.0.1/", "http://169.254.169.254/latest", "http://[fd00::1]/"])
async def test_an_address_inside_is_refused_with_a_proxy_too(proxy, monkeypatch, url):
    monkeypatch.setenv("http_proxy", proxy.url())
    with pytest.raises(FailedPrecondition, match="internal address"):
        await WebhookHttp(()).post(url, {}, b"{}")
    assert proxy.asked == []


async def test_a_network_that_the_operator_allows_is_reached_without_the_proxy(proxy, named, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy.url())
    heads: list[bytes] = []
    async with target(heads) as port:
        assert await named("127.0.0.1").post(f"http://hooks.example:{port}/", {}, b"{}") == 204
    assert proxy.asked == []


@pytest.mark.parametrize(("login", "says"), [("user:pass", "answers 407"), ("", "closed|answers 403")])
async def test_a_proxy_that_refuses_is_named(monkeypatch, login, says):
    with FakeProxy(login=login, refuses=0 if login else 403) as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy.place}")
        with pytest.raises(Unavailable, match=f"the proxy {proxy.place} .*({says})"):
            await WebhookHttp(()).post("https://hooks.invalid/", {}, b"{}")


async def test_a_proxy_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(Unavailable, match=r"the proxy 127.0.0.1:1 cannot be reached"):
        await WebhookHttp(()).post("http://hooks.invalid/", {}, b"{}")


@pytest.fixture
def named(monkeypatch):
    """The addresses of hooks.example, in this order."""

    def name(*addresses):
        sender = WebhookHttp(LOOPBACK)
        allowed = [ip_address(each) for each in addresses]

        async def resolve(host, port):
            return allowed

        monkeypatch.setattr(sender, "_resolve", resolve)
        return sender

    return name


async def test_the_second_address_is_called_where_the_first_refuses(named):
    heads: list[bytes] = []
    async with target(heads) as port:
        assert await named("127.0.0.2", "127.0.0.1").post(f"http://hooks.example:{port}/", {}, b"{}") == 204


async def test_the_second_address_is_called_where_the_first_is_silent(named):
    heads: list[bytes] = []
    async with target(heads) as port:
        hole = socket.create_server(("127.0.0.2", port), backlog=0)
        held = [socket.socket() for _ in range(3)]
        for each in held:
            each.setblocking(False)
            each.connect_ex(("127.0.0.2", port))
        assert await named("127.0.0.2", "::1", "127.0.0.1").post(f"http://hooks.example:{port}/", {}, b"{}") == 204
        for each in (hole, *held):
            each.close()
    assert len(heads) == 1


async def test_where_no_address_answers_the_webhook_is_tried_later(named):
    with pytest.raises(Unavailable, match="cannot be reached: ConnectionRefusedError"):
        await named("127.0.0.2", "127.0.0.1").post("http://hooks.example:1/", {}, b"{}")
