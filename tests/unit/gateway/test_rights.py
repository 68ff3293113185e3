"""What each role may call: over gRPC every method, over HTTP every path."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import httpx
import pytest
from fastapi.routing import APIRoute

from fanlight.audit_log.v1 import audit_log_pb2
from fanlight.blobs.v1 import blobs_pb2
from fanlight.gateway.v1 import gateway_pb2
from fanlight.keys.v1 import keys_pb2
from fanlight.nodes.v1 import nodes_pb2
from fanlight.records.v1 import records_pb2
from fanlight.tenants.v1 import tenants_pb2
from services.gateway.app.tenants import OPERATOR, Tenant, callers_of
from services.gateway.domain.keys import RIGHTS, KeyRole, Right
from services.gateway.http.app import http_app
from services.gateway.http.bodies import CallerWith, HttpOptions
from services.gateway.http.credentials import COOKIE
from services.kernel.config import GatewayCommonSettings
from tests.fakes.fleet import Fleet
from tests.fakes.rpc_gateway import serving

TOKEN, ACME = "operator-0123456789", "acme-0123456789"

RPCS: dict[str, Right] = {
    **dict.fromkeys(("CreateJob", "CreateJobs", "CancelJob", "DeleteJob", "RedriveDeadLetter"), Right.SUBMIT),
    **dict.fromkeys(("GetJob", "ExplainJob", "ListJobs", "WatchJob", "GetWebhook", "ListDeadLetters"), Right.READ),
    **dict.fromkeys(("GetDeadLetter", "ListAnnotators", "ListModels", "ListWorkers"), Right.READ),
    **dict.fromkeys(("WriteBlob", "PrepareUpload", "HasBlobs", "DeleteBlob"), Right.SUBMIT),
    **dict.fromkeys(("ReadBlob", "PrepareRead"), Right.READ),
    **dict.fromkeys(("CreateKey", "ListKeys", "GetKey", "RotateKey", "RevokeKey"), Right.MANAGE),
    **dict.fromkeys(("CreateInvite", "ListInvites", "RemoveInvite", "ListNodes", "GetNode"), Right.OPERATE),
    **dict.fromkeys(("DrainNode", "RevokeNode", "PurgeNode", "RemoveNode"), Right.OPERATE),
    **dict.fromkeys(("SetTenant", "ListTenants", "GetTenant", "DeleteTenant"), Right.OPERATE),
    **dict.fromkeys(("RotateDataKey", "GetSealing"), Right.OPERATE),
    **dict.fromkeys(("ListAuditEntries", "ListAuditChains", "FollowAuditLog"), Right.OPERATE),
    "GetQuota": Right.QUEUE,
    **dict.fromkeys(("ListDamagedRecords", "GetDamagedRecord", "RemoveDamagedRecord"), Right.OPERATE),
}
# Those whose proof is in the request.
FOR_ANYBODY = {"Join", "RenewCredential", "OpenSession"}
SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (gateway_pb2, "JobService"),
        (blobs_pb2, "BlobService"),
        (keys_pb2, "KeyService"),
        (nodes_pb2, "NodeService"),
        (records_pb2, "RecordService"),
        (tenants_pb2, "TenantService"),
        (audit_log_pb2, "AuditLogService"),
    )
]
METHODS = [(service.full_name, method) for service in SERVICES for method in service.methods]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as running:
        yield running


async def secrets_of(fleet: Fleet) -> dict[KeyRole, str]:
    """A key of each role. Keys count where there is an operator's token."""
    create = fleet.gateway.keys.create
    return {
        role: (
            await create(
                OPERATOR, tenant="default" if role is KeyRole.OPERATOR else "acme", role=role, note="", ttl_s=0.0
            )
        ).secret
        for role in KeyRole
    }


def test_every_method_has_a_right() -> None:
    assert {method.name for _, method in METHODS} == set(RPCS) | FOR_ANYBODY


async def test_each_role_calls_the_methods_that_it_has_the_right_for(fleet: Fleet) -> None:
    wrong = []
    async with (
        serving(fleet, GatewayCommonSettings(drain_grace_s=0, client_token=TOKEN)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        secrets = await secrets_of(fleet)
        for service, method in METHODS:
            if method.name in FOR_ANYBODY:
                continue
            for role, secret in secrets.items():
                code = await code_of(channel, f"/{service}/{method.name}", method, secret)
                is_refused = code is grpc.StatusCode.PERMISSION_DENIED
                if code is grpc.StatusCode.UNAUTHENTICATED or is_refused == (RPCS[method.name] in RIGHTS[role]):
                    wrong.append((method.name, role, code))
    assert wrong == []


async def code_of(channel: grpc.aio.Channel, path: str, method: object, secret: str) -> grpc.StatusCode:
    """Of a call with an empty message; only its first response is read."""
    make = channel.stream_stream if method.client_streaming else channel.unary_stream  # type: ignore[attr-defined]
    sent = b"" if not method.client_streaming else iter([b"\x0a\x02\x08\x00"])  # type: ignore[attr-defined]
    call = make(path)(sent, metadata=(("authorization", f"Bearer {secret}"),), timeout=10)
    try:
        async for _ in call:
            call.cancel()
            return grpc.StatusCode.OK
        return await call.code()
    except grpc.aio.AioRpcError as error:
        return error.code()


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    callers = callers_of(TOKEN, [Tenant(name="acme", token=ACME)], fleet.gateway.keys)
    fleet.gateway.keys.use_tokens(callers.tokens)
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        yield client


def test_every_path_has_a_right(fleet: Fleet) -> None:
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions())
    routes = [each for router in app.routes for each in getattr(router, "original_router", app).routes]
    paths = [each for each in routes if isinstance(each, APIRoute)]
    assert len(paths) > 50
    bare = {
        route.path
        for route in paths
        if not any(isinstance(each.call, CallerWith) for each in route.dependant.dependencies)
        and not any(isinstance(each.dependency, CallerWith) for each in route.dependencies)
    }
    assert bare == {"/healthz", "/readyz", "/docs", "/v1/session"}


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/v1/jobs", Right.READ),
        ("GET", "/v1/models", Right.READ),
        ("GET", "/v1/annotators", Right.READ),
        ("GET", "/v1/workers", Right.READ),
        ("POST", "/v1/jobs", Right.SUBMIT),
        ("POST", "/v1/jobs:batch", Right.SUBMIT),
        ("POST", "/v1/jobs/none:cancel", Right.SUBMIT),
        ("POST", "/v1/blobs", Right.SUBMIT),
        ("GET", "/v1/queue", Right.QUEUE),
        ("GET", "/metrics", Right.METRICS),
        ("GET", "/v1/keys", Right.MANAGE),
        ("POST", "/v1/keys", Right.MANAGE),
        ("GET", "/v1/nodes", Right.OPERATE),
        ("GET", "/v1/quota", Right.QUEUE),
        ("GET", "/v1/tenants", Right.OPERATE),
        ("HEAD", "/v1/tenants", Right.OPERATE),
        ("HEAD", "/v1/tenants/acme", Right.OPERATE),
        ("HEAD", "/v1/keys", Right.MANAGE),
        ("HEAD", "/v1/jobs", Right.READ),
        ("PATCH", "/v1/tenants/acme", Right.OPERATE),
        ("DELETE", "/v1/tenants/none", Right.OPERATE),
        ("POST", "/v1/tenants/none:rotate-data-key", Right.OPERATE),
        ("GET", "/v1/sealing", Right.OPERATE),
        ("GET", "/v1/audit-log", Right.OPERATE),
        ("GET", "/v1/audit-log/chains", Right.OPERATE),
        ("DELETE", "/v1/jobs/none", Right.SUBMIT),
        ("DELETE", f"/v1/blobs/sha256:{'0' * 64}", Right.SUBMIT),
        ("GET", "/v1/damaged-records", Right.OPERATE),
    ],
)
async def test_each_role_gets_the_paths_that_it_has_the_right_for(
    client: httpx.AsyncClient, fleet: Fleet, method: str, path: str, right: Right
) -> None:
    for role, secret in (await secrets_of(fleet)).items():
        answer = await client.request(method, path, headers={"X-Api-Key": secret})
        assert (answer.status_code == 403) == (right not in RIGHTS[role]), (role, answer.text)
        assert answer.status_code != 401


@pytest.mark.parametrize("name", ["X-Api-Key", "Salad-Api-Key", "apikey"])
async def test_a_key_is_taken_from_the_headers_that_clients_use(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get("/v1/jobs", headers={name: ACME})).status_code == 200
    assert (await client.get("/v1/jobs", headers={name: "wrong"})).status_code == 401


async def test_a_key_is_taken_from_basic_credentials(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/jobs", auth=("anybody", ACME))).status_code == 200
    assert (await client.get("/v1/jobs", auth=("anybody", "wrong"))).status_code == 401


async def test_two_tokens_that_differ_are_refused(client: httpx.AsyncClient) -> None:
    both = {"Authorization": f"Bearer {ACME}", "X-Api-Key": TOKEN}
    refused = await client.get("/v1/jobs", headers=both)
    assert (refused.status_code, "several" in refused.text) == (401, True)
    both["X-Api-Key"] = ACME
    assert (await client.get("/v1/jobs", headers=both)).status_code == 200


async def test_a_session_is_a_cookie_that_scripts_cannot_read(client: httpx.AsyncClient) -> None:
    opened = await client.post("/v1/session", headers={"Authorization": f"Bearer {ACME}"})
    assert opened.status_code == 201
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secret" not in opened.json()
    assert (await client.get("/v1/jobs")).status_code == 200
    assert (await client.delete("/v1/session")).status_code == 200
    client.cookies.clear()
    client.cookies.set(COOKIE, opened.cookies[COOKIE])
    assert (await client.get("/v1/jobs")).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://127.0.0.1:9"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 400),
        ({"Origin": "http://127.0.0.1"}, 400),
        ({}, 400),
    ],
)
async def test_another_sites_page_changes_nothing_with_the_cookie(
    client: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    await client.post("/v1/session", headers={"Authorization": f"Bearer {ACME}"})
    assert (await client.post("/v1/jobs", headers=headers, json={"nothing": 1})).status_code == status


async def test_who_proves_nothing_gets_no_session(client: httpx.AsyncClient) -> None:
    for body in (None, {"jwt": "a.b.c"}, {"jwt": ""}):
        assert (await client.post("/v1/session", json=body)).status_code == 401
    huge = await client.post("/v1/session", json={"jwt": "x" * 100_000})
    assert huge.status_code == 413


async def test_a_key_is_created_rotated_and_revoked_over_http(client: httpx.AsyncClient) -> None:
    admin = {"Authorization": f"Bearer {ACME}"}
    made = (await client.post("/v1/keys", headers=admin, json={"role": "ROLE_READ", "note": "for the wall"})).json()
    key = {"Authorization": f"Bearer {made['secret']}"}
    assert made["key"]["tenant"] == "acme"
    assert (await client.get("/v1/jobs", headers=key)).status_code == 200
    assert (await client.get("/v1/keys", headers=key)).status_code == 403
    [listed] = (await client.get("/v1/keys", headers=admin)).json()["keys"]
    assert (listed["note"], listed["role"]) == ("for the wall", "ROLE_READ")
    assert "secret" not in str(listed).lower().replace("secret_hash", "hash")
    path = f"/v1/keys/{made['key']['id']}"
    rotated = await client.post(f"{path}:rotate", headers=admin, json={"overlap_s": 0})
    assert rotated.status_code == 201
    assert (await client.get("/v1/jobs", headers=key)).status_code == 401
    fresh = rotated.json()
    assert (await client.post(f"/v1/keys/{fresh['key']['id']}:revoke", headers=admin)).status_code == 200
    assert (await client.get("/v1/jobs", headers={"X-Api-Key": fresh["secret"]})).status_code == 401
    wrong = await client.post("/v1/keys", headers=admin, json={"role": "ROLE_KING"})
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (400, "role")
