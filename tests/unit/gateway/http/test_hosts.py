"""Names of the gateway, and pages of other sites: what browsers can be made to send, and what other clients do."""

import asyncio

import httpx
import pytest

from services.gateway.app.tenants import Caller, Callers
from services.gateway.config import GatewaySettings
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.http.hosts import host_names, parse_authority
from services.kernel.config import SettingsError, load
from tests.fakes.gateway import FakeGateway
from tests.fakes.http_serving import serving
from tests.fakes.memory_blobs import MemoryBlobs

LOOPBACK = "127.0.0.1:8080"


async def status_of(*, address=LOOPBACK, extra=(), needs_token=False, method="POST", path="/v1/blobs", **headers):
    """What a gateway that listens there answers."""
    callers = Callers({"right": Caller(tenant="acme")}) if needs_token else Callers()
    options = HttpOptions(callers=callers, host_names=host_names(address, extra, needs_token=needs_token))
    app = http_app(FakeGateway(), MemoryBlobs(), options)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if needs_token:
        sent["Authorization"] = "Bearer right"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{LOOPBACK}") as client:
        answer = await client.request(method, path, content=b"x" if method == "POST" else None, headers=sent)
    if answer.status_code == 403:
        assert answer.json()["error"]["reason"] == "MISDIRECTED"
    return answer.status_code


@pytest.mark.parametrize("needs_token", [False, True])
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8080", "localhost:8080", "LOCALHOST:8080", "localhost.:8080", "[::1]:8080", "[0:0::1]"],
)
async def test_own_names_are_served(host, needs_token):
    assert await status_of(Host=host, needs_token=needs_token) == 201


@pytest.mark.parametrize("needs_token", [False, True])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "host",
    [
        "rebound.example",
        "rebound.example:8080",
        "127.0.0.1.rebound.example",
        "localhost.rebound.example",
        "127.0.0.1:99999",
        "127.0.0.1:8080:8080",
        "user@127.0.0.1",
        "[::1",
        "[127.0.0.1]x",
        "10.0.0.1",
        "",
    ],
)
async def test_other_names_are_refused_on_loopback(host, method, needs_token):
    path = "/v1/jobs" if method == "GET" else "/v1/blobs"
    assert await status_of(Host=host, method=method, path=path, needs_token=needs_token) == 403


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_health_answers_under_any_name(path):
    assert await status_of(method="GET", path=path, Host="probe.example") == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://page.example",
        "null",
        "",
        "http://127.0.0.1:3000",
        "http://localhost",
        "https://127.0.0.1:8081",
        "file://127.0.0.1:8080",
        "http://127.0.0.1:8080.page.example",
        "http://127.0.0.1:8080@page.example",
    ],
)
@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", "application/json"])
async def test_pages_of_other_sites_are_refused(origin, content_type):
    assert await status_of(Origin=origin, Content_Type=content_type) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:8080"},
        {"Origin": "http://LOCALHOST:8080", "Host": "localhost:8080"},
        {"Origin": "http://localhost", "Host": "localhost"},
        {"Origin": "https://localhost:443", "Host": "localhost"},
        {"Origin": "http://[::1]:8080", "Host": "[::1]:8080"},
        {"Sec_Fetch_Site": "same-origin", "Origin": "http://127.0.0.1:8080"},
        {"Sec_Fetch_Site": "none"},
    ],
)
async def test_own_pages_are_served(headers):
    assert await status_of(**headers) == 201


async def test_a_browser_that_sends_no_origin_says_where_its_page_is_from():
    assert await status_of(Sec_Fetch_Site="cross-site") == 403
    assert await status_of(Sec_Fetch_Site="same-site") == 403
    # A link from another site to the documentation.
    assert await status_of(Sec_Fetch_Site="cross-site", method="GET", path="/docs") == 200


async def test_a_reverse_proxys_name_is_served_with_its_origin():
    extra = ["Images.example."]
    assert await status_of(extra=extra, Host="images.example", Origin="https://images.example") == 201
    assert await status_of(extra=extra, Host="127.0.0.1:8080", Origin="https://images.example") == 201
    assert await status_of(extra=extra, Host="127.0.0.1:8080", Origin="https://page.example") == 403


async def test_off_loopback_a_load_balancer_may_use_any_name():
    assert (
        await status_of(address="0.0.0.0:80", needs_token=True, Host="lb.internal", Origin="https://a.example") == 201
    )


async def test_off_loopback_without_tokens_pages_of_other_sites_are_refused():
    assert await status_of(address="0.0.0.0:80", Host="a.example", Origin="https://page.example") == 403
    assert await status_of(address="0.0.0.0:80", Host="a.example", Origin="https://a.example") == 201


async def test_off_loopback_names_that_are_set_are_the_only_ones_beside_addresses():
    own = {"address": "0.0.0.0:80", "needs_token": True, "extra": ["images.example"]}
    assert await status_of(**own, Host="images.example") == 201
    assert await status_of(**own, Host="10.1.2.3:80") == 201
    assert await status_of(**own, Host="other.example") == 403


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/jobs", b"200"),
        ("http://127.0.0.1/v1/jobs", b"200"),
        ("HTTP://localhost:1/v1/jobs?page_size=1", b"200"),
        ("http://127.0.0.1", b"404"),
        ("http://rebound.example/v1/jobs", b"403"),
        ("https://rebound.example/v1/jobs", b"403"),
        ("http://rebound.example/healthz", b"200"),
        ("http:///v1/jobs", b"403"),
        ("http://user@127.0.0.1/v1/jobs", b"403"),
        ("ftp://127.0.0.1/v1/jobs", b"404"),
        ("rebound.example:80", b"404"),
    ],
)
async def test_a_target_with_a_host_counts_before_the_header(target, status):
    options = HttpOptions(host_names=host_names(LOOPBACK, (), needs_token=False))
    async with serving(http_app(FakeGateway(), MemoryBlobs(), options)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
    assert answer.split(b" ", 2)[1] == status, answer


@pytest.mark.parametrize("names", ["https://a.example", "a.example:80", "a b", "a,,b", "a/b"])
def test_names_with_anything_else_are_a_settings_error(names, monkeypatch):
    monkeypatch.setenv("FANLIGHT_GATEWAY_HTTP_NAMES", names)
    with pytest.raises(SettingsError, match="FANLIGHT_GATEWAY_HTTP_NAMES: must be host names without a scheme or port"):
        load(GatewaySettings)


def test_an_authority_is_a_host_and_perhaps_a_port():
    assert parse_authority("A.example.:80") == parse_authority("a.example:80")
    assert parse_authority("a.example").port is None
    assert parse_authority("a.example:") is None


@pytest.mark.parametrize(("version", "status"), [("1.0", b"200"), ("1.1", b"400"), ("2.0", b"403"), ("9.9", b"403")])
async def test_only_http_1_0_may_leave_the_host_out(version, status):
    options = HttpOptions(host_names=host_names(LOOPBACK, (), needs_token=False))
    async with serving(http_app(FakeGateway(), MemoryBlobs(), options)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(f"GET /v1/jobs HTTP/{version}\r\n\r\n".encode())
        assert (await asyncio.wait_for(reader.readline(), 30)).split()[1] == status
        writer.close()
