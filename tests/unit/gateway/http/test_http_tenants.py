"""/v1/tenants and /v1/sealing, for the operator alone."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from services.gateway.adapters.sealed_store import SealedStore
from services.gateway.app.tenants import Tenant, callers_of
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.fleet import Fleet
from tests.fakes.memory_store import MemoryStore
from tests.fakes.sealing import data_keys

OPERATOR, ACME = "operator-0123456789", "acme-0123456789"
PATHS = [
    ("GET", "/v1/sealing"),
    ("HEAD", "/v1/sealing"),
    ("GET", "/v1/tenants"),
    ("HEAD", "/v1/tenants"),
    ("HEAD", "/v1/tenants/acme"),
    ("DELETE", "/v1/tenants/acme"),
    ("POST", "/v1/tenants/acme:rotate-data-key"),
]


@pytest.fixture
async def sealed(tmp_path: Path) -> AsyncIterator[Fleet]:
    keys = data_keys(tmp_path / "keys")
    store = SealedStore(MemoryStore(), keys)
    async with Fleet(store=store, data_keys=keys).running() as running:  # type: ignore[arg-type]  # another adapter
        await store.create("jobs", "a", b'{"version":2,"value":{"tenant":"acme"}}')
        yield running


@pytest.fixture
async def client(sealed: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(sealed) as client:
        yield client


def client_of(fleet: Fleet) -> httpx.AsyncClient:
    callers = callers_of(OPERATOR, [Tenant(name="acme", token=ACME)])
    fleet.gateway.keys.use_tokens(callers.tokens)
    transport = httpx.ASGITransport(http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers)))
    headers = {"Authorization": f"Bearer {OPERATOR}"}
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)


async def test_keys_are_shown_rotated_and_destroyed_with_their_tenant(client: httpx.AsyncClient) -> None:
    shown = (await client.get("/v1/sealing")).json()
    assert shown["is_on"] is True
    assert [(each["tenant"], each["current"]) for each in shown["tenants"]] == [("acme", 1)]
    assert (await client.post("/v1/tenants/acme:rotate-data-key")).json() == {"tenant": "acme", "number": 2}
    assert (await client.post("/v1/tenants/other:rotate-data-key")).status_code == 404
    deleted = (await client.delete("/v1/tenants/acme")).json()
    assert deleted["is_key_destroyed"] is True
    assert "token in FANLIGHT_GATEWAY_TENANTS_FILE" in deleted["remains"][0]
    assert (await client.get("/v1/sealing")).json()["tenants"][0]["is_destroyed"] is True


async def test_names_that_are_none_and_the_operators_own_are_refused(client: httpx.AsyncClient) -> None:
    wrong = await client.delete("/v1/tenants/No_Tenant")
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (400, "name")
    assert (await client.delete("/v1/tenants/default")).status_code == 409


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_a_tenant_and_a_stranger_may_do_none_of_it(client: httpx.AsyncClient, method: str, path: str) -> None:
    for token, status in ((ACME, 403), ("", 401)):
        answer = await client.request(method, path, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == status


async def test_a_gateway_that_seals_nothing_says_so() -> None:
    async with Fleet().running() as fleet, client_of(fleet) as client:
        assert (await client.get("/v1/sealing")).json().get("is_on", False) is False
        assert (await client.post("/v1/tenants/acme:rotate-data-key")).status_code == 409
