"""/v1/nodes, for the operator alone."""

from collections.abc import AsyncIterator

import httpx
import pytest

from services.gateway.app.tenants import Tenant, callers_of
from services.gateway.domain.nodes import Grant
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.fleet import Fleet

OPERATOR, ACME = "operator-0123456789", "acme-0123456789"


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as running:
        yield running


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    callers = callers_of(OPERATOR, [Tenant(name="acme", token=ACME)])
    transport = httpx.ASGITransport(http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers)))
    headers = {"Authorization": f"Bearer {OPERATOR}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        yield client


async def joined(fleet: Fleet) -> str:
    invite, secret = await fleet.gateway.nodes.invite(Grant(pool="home"), uses=1, ttl_s=60.0, comment="")
    return (await fleet.gateway.nodes.join_with_code(invite.id, secret, name="box", stages=())).node.id


async def test_a_node_is_listed_drained_revoked_and_removed(client: httpx.AsyncClient, fleet: Fleet) -> None:
    node = await joined(fleet)
    (listed,) = (await client.get("/v1/nodes")).json()["nodes"]
    assert (listed["id"], listed["name"], listed["state"]) == (node, "box", "STATE_ACTIVE")
    assert listed["grant"]["pool"] == "home"
    assert (await client.post(f"/v1/nodes/{node}:drain")).json()["state"] == "STATE_DRAINING"
    assert (await client.post(f"/v1/nodes/{node}:undrain")).json()["state"] == "STATE_ACTIVE"
    assert (await client.delete(f"/v1/nodes/{node}")).status_code == 409
    revoked = (await client.post(f"/v1/nodes/{node}:revoke", params={"reason": "it lied"})).json()
    assert (revoked["state"], revoked["reason"]) == ("STATE_REVOKED", "it lied")
    assert (await client.post(f"/v1/nodes/{node}:purge")).json() == {"purged": 0}
    assert (await client.delete(f"/v1/nodes/{node}")).status_code == 200
    assert (await client.get(f"/v1/nodes/{node}")).status_code == 404


async def test_a_tenant_sees_and_ends_no_node(client: httpx.AsyncClient, fleet: Fleet) -> None:
    node = await joined(fleet)
    headers = {"Authorization": f"Bearer {ACME}"}
    for method, path in (("GET", "/v1/nodes"), ("GET", f"/v1/nodes/{node}"), ("POST", f"/v1/nodes/{node}:revoke")):
        answer = await client.request(method, path, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["reason"] == "PERMISSION_DENIED"
    assert not fleet.gateway.nodes.is_revoked(node)


async def test_a_tenant_sees_no_files_of_nodes(client: httpx.AsyncClient) -> None:
    query = {"left_out": "true"}
    assert (await client.get("/v1/models", params=query)).status_code == 200
    answer = await client.get("/v1/models", params=query, headers={"Authorization": f"Bearer {ACME}"})
    assert (answer.status_code, answer.json()["error"]["reason"]) == (403, "PERMISSION_DENIED")
    assert (await client.get("/v1/models", headers={"Authorization": f"Bearer {ACME}"})).status_code == 200
