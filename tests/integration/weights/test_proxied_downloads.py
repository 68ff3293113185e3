"""Downloads on a node that reaches the outside through a proxy only, and servers whose certificate nobody knows."""

import importlib.util
import json
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from fanlight.errors import FanlightError
from services.kernel.network import tls_context
from services.weights.errors import SourceFailed
from services.weights.references.references import S3Ref
from services.weights.transfer import s3
from tests.fakes.proxy import FakeProxy
from tests.fakes.weight_sites import put_repository, safetensors
from tests.fakes.weight_stores import open_store

BODY = safetensors({"w": b"1234" * 600})
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """Nothing of the caller's proxies and certificates."""
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


HOST = "http://files.invalid"
needs_socks = pytest.mark.skipif(importlib.util.find_spec("socksio") is None, reason="takes socksio")


@pytest.mark.parametrize(
    ("variable", "scheme", "login"),
    [
        ("http_proxy", "http", ""),
        ("HTTP_PROXY", "http", "user:p%40ss"),
        ("all_proxy", "http", ""),
        pytest.param("ALL_PROXY", "socks5", "", marks=needs_socks),
        pytest.param("http_proxy", "socks5h", "user:pass", marks=needs_socks),
    ],
)
async def test_weights_come_through_the_proxy(server, store, monkeypatch, variable, scheme, login):
    with FakeProxy(login=login.replace("%40", "@")) as proxy:
        proxy.lead("files.invalid", server.put("/a.safetensors", BODY))
        monkeypatch.setenv(variable, f"{scheme}://{login + '@' if login else ''}{proxy.place}")
        assert (await store.ensure(f"{HOST}/a.safetensors")).read_bytes() == BODY
        assert proxy.asked


async def test_a_hub_and_where_it_redirects_to_are_asked_through_the_proxy(server, settings, proxy, monkeypatch):
    put_repository(server, "org/m", {"m.safetensors": BODY})
    for host in ("hub.invalid", "localhost", "127.0.0.1"):
        proxy.lead(host, server.url)
    for file in server.files.values():
        file.redirect = file.redirect.replace("localhost", "cdn.invalid")
    proxy.lead("cdn.invalid", server.url)
    monkeypatch.setenv("http_proxy", proxy.url())
    async with open_store(settings(hf_endpoint="http://hub.invalid")) as store:
        assert (await store.ensure("hf:org/m/m.safetensors")).read_bytes() == BODY
    assert {url.split("/")[2].partition(":")[0] for url in proxy.asked} == {"hub.invalid", "cdn.invalid"}


@pytest.mark.parametrize("excepted", ["127.0.0.1", "127.0.0.0/8", ""])
async def test_an_address_here_is_reached_without_the_proxy(server, store, proxy, monkeypatch, excepted):
    monkeypatch.setenv("http_proxy", proxy.url())
    monkeypatch.setenv("no_proxy", excepted)
    assert (await store.ensure(server.put("/a.safetensors", BODY))).read_bytes() == BODY
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda proxy: proxy.url().replace("user:pass@", ""), "the proxy refuses .*407"),
        (lambda proxy: "http://127.0.0.1:1", "files.invalid cannot be reached through the proxy 127.0.0.1:1"),
        (lambda proxy: "gopher://p:1", "http_proxy names no proxy that can be used"),
    ],
)
async def test_a_proxy_that_does_not_serve_us_is_named(settings, monkeypatch, make, says):
    with FakeProxy(login="user:pass") as proxy:
        monkeypatch.setenv("http_proxy", make(proxy))
        async with open_store(settings(retries=0)) as store:
            with pytest.raises(FanlightError, match=says):
                await store.ensure(f"{HOST}/a.safetensors")


@pytest.mark.parametrize(("status", "says"), [(403, "does not connect to files.invalid: 403"), (407, "user")])
async def test_a_proxy_that_opens_no_tunnel_is_named(settings, monkeypatch, status, says):
    with FakeProxy(refuses=status) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url())
        async with open_store(settings(retries=0)) as store:
            with pytest.raises(SourceFailed, match=f"the proxy {proxy.place} .*{says}"):
                await store.ensure("https://files.invalid/a.safetensors")


@pytest.fixture
def https(tmp_path):
    """A server of BODY with a certificate of an authority that nobody knows, for a name: its port; the PEM file."""
    servers = []

    def serve(name):
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        made = ThreadingHTTPServer(("127.0.0.1", 0), Body)
        made.socket = context.wrap_socket(made.socket, server_side=True, do_handshake_on_connect=False)
        made.daemon_threads = True
        made.handle_error = lambda *_: None
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(made)
        roots = tmp_path / f"{len(servers)}.pem"
        authority.cert_pem.write_to_path(str(roots))
        return made.server_address[1], str(roots)

    yield serve
    for made in servers:
        made.shutdown()
        made.server_close()


class Body(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_):
        pass


async def test_an_untrusted_certificate_is_reported_as_such_and_trusted_where_its_root_is_named(
    https, settings, monkeypatch, proxy
):
    port, roots = https("files.invalid")
    proxy.lead("files.invalid", f"https://127.0.0.1:{port}")
    monkeypatch.setenv("https_proxy", proxy.url())
    async with open_store(settings()) as store:
        with pytest.raises(SourceFailed, match=r"certificate that this machine does not trust .*set SSL_CERT_FILE"):
            await store.ensure("https://files.invalid/a.safetensors")
    monkeypatch.setenv("SSL_CERT_FILE", roots)
    tls_context.cache_clear()
    async with open_store(settings()) as store:
        assert (await store.ensure("https://files.invalid/a.safetensors")).read_bytes() == BODY


async def test_a_certificate_for_another_name_is_reported_as_such(https, settings, monkeypatch):
    port, roots = https("other.invalid")
    monkeypatch.setenv("SSL_CERT_FILE", roots)
    async with open_store(settings()) as store:
        with pytest.raises(SourceFailed, match="localhost shows a certificate for another name"):
            await store.ensure(f"https://localhost:{port}/a.safetensors")


async def test_a_file_of_roots_that_cannot_be_read_is_named(settings, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/roots.pem")
    async with open_store(settings(retries=0)) as store:
        with pytest.raises(FanlightError, match=r"SSL_CERT_FILE: /nowhere/roots.pem is no readable file"):
            await store.ensure("https://localhost:1/a.safetensors")


async def test_every_address_of_a_name_is_tried(server, store, monkeypatch):
    """The first one takes the connection and never answers to it."""
    real, hole = socket.getaddrinfo, socket.create_server(("127.0.0.2", 0), backlog=0)
    port = int(server.url.rpartition(":")[2])
    hole.close()
    hole = socket.create_server(("127.0.0.2", port), backlog=0)
    held = [socket.socket() for _ in range(3)]
    for each in held:
        each.setblocking(False)
        each.connect_ex(("127.0.0.2", port))

    def two(host, *words, **more):
        if host not in ("files.example", b"files.example"):
            return real(host, *words, **more)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ("127.0.0.2", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    server.put("/a.safetensors", BODY)
    assert (await store.ensure(f"http://files.example:{port}/a.safetensors")).read_bytes() == BODY
    for each in (hole, *held):
        each.close()


LISTING = b"""<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated><Name>b</Name>
<Contents><Key>m/a.bin</Key><Size>3</Size><ETag>"1"</ETag></Contents></ListBucketResult>"""


@pytest.mark.parametrize("scheme", ["http", pytest.param("socks5", marks=needs_socks)])
@pytest.mark.filterwarnings("ignore:aiobotocore's httpx backend:DeprecationWarning")
async def test_s3_is_asked_through_the_proxy(server, monkeypatch, proxy, scheme):
    for name, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    # aiobotocore's httpx writes the whole address into its request.
    for path in ("/bucket", "http://s3.invalid/bucket"):
        server.put(path, LISTING)
    proxy.lead("s3.invalid", server.url)
    monkeypatch.setenv("all_proxy", proxy.url(scheme))
    found = await s3.listing(S3Ref(bucket="bucket", key="m"), endpoint="http://s3.invalid", region="r", limit=5)
    assert found == [("m/a.bin", 3, '"1"')]
    assert "s3.invalid" in json.dumps(proxy.asked)
