"""Client certificates on HTTP: with mutual TLS a worker's opens nothing, whatever token comes with it."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import trustme

from services.gateway.app.tenants import callers_of
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.fleet import Fleet
from tests.fakes.http_serving import serving

OPERATOR = "operator-0123456789"


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def url(authority: trustme.CA, tmp_path: Path) -> AsyncIterator[str]:
    own = authority.issue_cert("127.0.0.1")
    (tmp_path / "cert").write_bytes(own.cert_chain_pems[0].bytes())
    (tmp_path / "key").write_bytes(own.private_key_pem.bytes())
    (tmp_path / "roots").write_bytes(authority.cert_pem.bytes())
    files = {"tls_cert_file": tmp_path / "cert", "tls_key_file": tmp_path / "key"}
    async with Fleet().running() as fleet:
        app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers_of(OPERATOR, [])))
        async with serving(app, tls_client_ca_file=tmp_path / "roots", **files) as plain:
            yield plain.replace("http://", "https://")


def showing(authority: trustme.CA, role: str | None, *, token: str = OPERATOR) -> httpx.AsyncClient:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    authority.issue_cert("box.example", common_name="box", organization_unit_name=role).configure_cert(context)
    return httpx.AsyncClient(verify=context, headers={"Authorization": f"Bearer {token}"})


@pytest.mark.parametrize(
    ("role", "path", "status", "says"),
    [
        ("client", "/v1/jobs", 200, ""),
        ("operator", "/v1/jobs", 200, ""),
        ("worker", "/v1/jobs", 403, "role is worker; this takes client or operator"),
        (None, "/v1/jobs", 403, "has no role, or several: it needs one SPIFFE id"),
        ("operator", "/v1/nodes", 200, ""),
        ("client", "/v1/nodes", 403, "role is client; this takes operator"),
        ("worker", "/v1/nodes", 403, "role is worker"),
        ("operator", "/v1/damaged-records", 200, ""),
        ("client", "/v1/damaged-records", 403, "role is client; this takes operator"),
        ("worker", "/metrics", 403, "role is worker"),
        ("worker", "/v1/blobs/default/sha256:0", 403, "role is worker"),
        ("worker", "/healthz", 200, ""),
        (None, "/readyz", 200, ""),
    ],
)
async def test_a_certificates_role_says_which_routes_it_opens(
    url: str, authority: trustme.CA, role: str | None, path: str, status: int, says: str
) -> None:
    async with showing(authority, role) as client:
        answer = await client.get(f"{url}{path}")
    assert answer.status_code == status
    if says:
        assert answer.json()["error"]["reason"] == "PERMISSION_DENIED"
        assert says in answer.json()["error"]["message"]


async def test_a_certificate_replaces_no_token(url: str, authority: trustme.CA) -> None:
    async with showing(authority, "operator", token="wrong") as client:
        assert (await client.get(f"{url}/v1/jobs")).status_code == 401


async def test_each_connection_has_its_own_certificate(url: str, authority: trustme.CA) -> None:
    async with showing(authority, "worker") as worker, showing(authority, "client") as client:
        for _ in range(2):
            assert (await worker.get(f"{url}/v1/jobs")).status_code == 403
            assert (await client.get(f"{url}/v1/jobs")).status_code == 200
