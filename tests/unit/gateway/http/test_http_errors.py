"""One shape of errors for everything, and who may call at all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from fanlight import errors
from services.gateway.app.tenants import Caller, callers_of
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.gateway import FakeGateway
from tests.fakes.memory_blobs import MemoryBlobs

TOKEN = "a-token-of-clients"


@asynccontextmanager
async def serving(gateway: FakeGateway, **options: str | int) -> AsyncIterator[httpx.AsyncClient]:
    app = http_app(gateway, MemoryBlobs(), HttpOptions(**options))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


async def test_a_path_that_is_not_there_is_not_found(client: httpx.AsyncClient) -> None:
    response = await client.get("/v2/jobs")
    assert response.status_code == 404
    assert response.json()["error"]["reason"] == "NOT_FOUND"


async def test_an_unknown_method_is_answered_with_the_known_ones(client: httpx.AsyncClient) -> None:
    response = await client.put("/v1/jobs/1")
    assert response.status_code == 405
    assert response.json()["error"]["reason"] == "METHOD_NOT_ALLOWED"
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/jobs/1?wait=soon", "wait"),
        ("/v1/jobs/1?wait=61", "wait"),
        ("/v1/jobs/1?wait=-1", "wait"),
        ("/v1/jobs/1?wait=nan", "wait"),
        ("/v1/jobs?page_size=1001", "page_size"),
        ("/v1/jobs?page_size=-1", "page_size"),
        ("/v1/jobs?state=happy", "state"),
        ("/v1/jobs?sate=running", "sate"),
        ("/v1/models?kind=lora", "kind"),
    ],
)
async def test_a_wrong_parameter_is_named(client: httpx.AsyncClient, path: str, field: str) -> None:
    response = await client.get(path)
    assert response.status_code == 400
    assert response.json()["error"]["reason"] == "INVALID_FIELD"
    assert response.json()["error"]["field"] == field


async def test_an_unexpected_exception_is_reported_by_a_reference_alone(
    gateway: FakeGateway, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(name: str) -> None:
        raise RuntimeError("the inside of the gateway")

    monkeypatch.setattr(gateway.jobs, "get", fail)
    response = await client.get("/v1/jobs/1")
    assert response.status_code == 500
    assert response.json()["error"]["reason"] == "INTERNAL"
    assert "reference" in response.json()["error"]["message"]
    assert "inside" not in response.text


async def test_a_refusal_for_want_of_room_says_when_to_come_again(
    gateway: FakeGateway, client: httpx.AsyncClient
) -> None:
    gateway.jobs.refusal = errors.ResourceExhausted("10 tasks wait", retry_after_s=2.5)
    response = await client.post("/v1/jobs", json={"generation": {"prompt": "a teapot"}})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["retry_after_s"] == 2.5


@pytest.mark.parametrize(
    "header", ["", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer ", "Bearer \xe9"]
)
async def test_every_path_but_health_wants_the_token(gateway: FakeGateway, header: str) -> None:
    headers = {"authorization": header.encode("latin-1")} if header else {}
    async with serving(gateway, callers=callers_of(TOKEN, [])) as client:
        for path in ("/v1/jobs", "/v1/models", "/docs", "/openapi.json", "/nowhere", "/healthz/"):
            response = await client.get(path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["reason"] == "UNAUTHENTICATED"
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER  {TOKEN}"])
async def test_the_right_token_opens(gateway: FakeGateway, header: str) -> None:
    async with serving(gateway, callers=callers_of(TOKEN, [])) as client:
        assert (await client.get("/v1/jobs", headers={"authorization": header})).status_code == 200


async def test_health_needs_no_token(gateway: FakeGateway) -> None:
    async with serving(gateway, callers=callers_of(TOKEN, [])) as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_a_draining_gateway_is_alive_and_not_ready(gateway: FakeGateway, client: httpx.AsyncClient) -> None:
    gateway.ready = False
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503


async def test_a_gateway_whose_store_fails_is_not_ready(
    gateway: FakeGateway, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise errors.Unavailable("the store is closed")

    monkeypatch.setattr(gateway.probe, "write", fail)
    assert (await client.get("/readyz")).status_code == 503


async def test_more_requests_than_the_limit_are_sent_away_and_health_still_answers(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()
    get = gateway.jobs.get

    async def slow(name: str, caller: Caller) -> object:
        begun.set()
        await go.wait()
        return await get(name, caller)

    monkeypatch.setattr(gateway.jobs, "get", slow)
    async with serving(gateway, requests_limit=1) as client:
        first = asyncio.create_task(client.get("/v1/jobs/1"))
        await begun.wait()
        second = await client.get("/v1/jobs/1")
        assert (second.status_code, second.headers["retry-after"]) == (429, "2")
        assert (await client.get("/healthz")).status_code == 200
        go.set()
        assert (await first).status_code == 404
        assert (await client.get("/v1/jobs/1")).status_code == 404
