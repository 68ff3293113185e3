"""A gateway with its own certificate, and workers that join it with a code: real processes, as on two machines."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec

from fanlight.client import AsyncClient
from fanlight.contract.join_code import parse_join_code
from fanlight.errors import CallFailed
from fanlight.health import own_trust
from tests.fakes.secured_gateway import PATIENCE_S, PIXEL, TOKEN, Secured, ended, live_workers, until, worker


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Secured]:
    (tmp_path / "gateway").mkdir()
    process = Secured(tmp_path / "gateway" / "data")
    await process.start()
    yield process
    await process.stop()


async def test_a_node_needs_nothing_but_its_code_and_stays_the_same_node(gateway: Secured, tmp_path: Path) -> None:
    code = parse_join_code(await gateway.command("nodes", "invite"))
    assert code.is_own
    environ = {
        "FANLIGHT_WORKER_JOIN_CODE": f"{code}@{gateway.address}",
        "FANLIGHT_WORKER_STATE_DIR": str(tmp_path / "state"),
    }
    ids = []
    async with gateway.client() as client:
        for _ in range(2):
            async with worker(tmp_path / "worker.log", environ):
                await until(client.list_annotators, bool)
                job = await client.annotate("echo", PIXEL)
                assert await client.read_blob(job.images[0].blob) == PIXEL
                workers = await live_workers(client)
            (node,) = await client.nodes.list()
            assert all(each.worker.id.startswith(f"{node.id}-preprocess-") for each in workers)
            ids.append(node.id)
            await gateway.stop(signal.SIGTERM)
            await gateway.start()
    assert ids[0] == ids[1]


async def test_the_gateways_own_pins_hold_and_nothing_is_in_clear(gateway: Secured, tmp_path: Path) -> None:
    for address in (gateway.grpc, gateway.http):
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            # A TLS alert, or nothing.
            assert plain.recv(1024)[:1] in (b"\x15", b"")
    context = ssl.create_default_context(cafile=str(gateway.authority))
    http_port = int(gateway.http.rpartition(":")[2])
    with (
        socket.create_connection(("127.0.0.1", http_port), timeout=10) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as secure,
    ):
        assert secure.version() == "TLSv1.3"
    async with AsyncClient(gateway.address, token=TOKEN, connect_s=0.1, timeout_s=5) as client:
        with pytest.raises(CallFailed):
            await client.list_workers()
    assert oct(gateway.data.joinpath("tls").stat().st_mode & 0o777) == "0o700"


async def test_a_worker_that_is_not_let_in_ends_with_the_reason(gateway: Secured, tmp_path: Path) -> None:
    code = parse_join_code(await gateway.command("nodes", "invite"))
    environ = {"FANLIGHT_WORKER_GATEWAY": gateway.address, "FANLIGHT_WORKER_STATE_DIR": str(tmp_path / "state")}
    forged = str(code).replace(code.secret, "0" * 64)
    assert await ended(tmp_path / "forged.log", {**environ, "FANLIGHT_WORKER_JOIN_CODE": forged}) == 78
    assert "does not let this node join" in (tmp_path / "forged.log").read_text()
    elsewhere = str(code).replace(code.authority, "0" * 64)
    assert await ended(tmp_path / "elsewhere.log", {**environ, "FANLIGHT_WORKER_JOIN_CODE": elsewhere}) == 78
    assert "shows another certificate" in (tmp_path / "elsewhere.log").read_text()
    # The one code is still unused, and no try has printed a secret.
    for log in ("forged.log", "elsewhere.log"):
        assert code.secret not in (tmp_path / log).read_text()
    assert json.loads(await gateway.command("nodes", "invites", "--json"))[0].get("used", 0) == 0


async def test_a_code_is_written_to_a_file_once_while_it_can_be_used(gateway: Secured, tmp_path: Path) -> None:
    file = tmp_path / "code"
    invite = ("nodes", "invite", "--out", str(file))
    assert not await gateway.command(*invite)
    first = parse_join_code(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    await gateway.command(*invite)
    assert parse_join_code(file.read_text()) == first
    await gateway.command("nodes", "uninvite", first.invite)
    await gateway.command(*invite)
    assert parse_join_code(file.read_text()).invite != first.invite


async def test_a_container_with_a_gateway_finds_it_healthy_by_the_certificate_that_it_made(gateway: Secured) -> None:
    environ = {"FANLIGHT_GATEWAY_GRPC": gateway.grpc, "FANLIGHT_GATEWAY_DATA_DIR": str(gateway.data)}
    assert own_trust(gateway.address, environ).roots == (gateway.data / "tls" / "gateway.pem").read_bytes()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fanlight.health", "--service", "readiness"),
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        printed, _ = await process.communicate()
    assert b": serving (ready" in printed


async def test_a_revoked_node_comes_back_only_with_a_use_of_its_code(gateway: Secured, tmp_path: Path) -> None:
    code = await gateway.command("nodes", "invite", "--uses", "2")
    environ = {
        "FANLIGHT_WORKER_JOIN_CODE": code,
        "FANLIGHT_WORKER_GATEWAY": gateway.address,
        "FANLIGHT_WORKER_STATE_DIR": str(tmp_path / "state"),
        "FANLIGHT_WORKER_POLL_WAIT_S": "1",
    }
    async with gateway.client() as client, worker(tmp_path / "worker.log", environ):
        await live_workers(client)
        (first,) = await client.nodes.list()
        await client.nodes.revoke(first.id)
        nodes = await until(client.nodes.list, lambda found: len(found) == 2 and bool(found[0].workers))
    assert re.search(r"node_joined.*node_joined", (tmp_path / "worker.log").read_text(), re.DOTALL)
    assert {each.id for each in nodes} > {first.id}


ISSUER = "https://kubernetes.default.svc"
RULE = """
[[issuer]]
name = "cluster"
kind = "kubernetes"
issuer = "{issuer}"
audience = ["fanlight"]
keys_file = "{keys}"
pool = "cluster"
claims = {{ "kubernetes.io/namespace" = ["fanlight"] }}
"""


def issue(folder: Path, *, late_s: float = 0.0) -> Path:
    """A pod's projected token, of a clock that is late, and the issuers' file; the token's file."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = jwt.get_algorithm_by_name("ES256").to_jwk(key.public_key(), as_dict=True)
    (folder / "keys.json").write_text(json.dumps({"keys": [{**public, "kid": "1", "use": "sig", "alg": "ES256"}]}))
    (folder / "issuers.toml").write_text(RULE.format(issuer=ISSUER, keys=folder / "keys.json"))
    now_s = time.time() - late_s
    claims = {
        "iss": ISSUER,
        "aud": ["fanlight"],
        "iat": now_s,
        "nbf": now_s,
        "exp": now_s + 600,
        "sub": "system:serviceaccount:fanlight:worker",
        "kubernetes.io": {"namespace": "fanlight", "pod": {"name": "diffusion-0", "uid": "8f14e45f"}},
    }
    (folder / "token").write_text(jwt.encode(claims, key, algorithm="ES256", headers={"kid": "1"}))
    return folder / "token"


@pytest.mark.parametrize("late_s", [0.0, 240.0, -240.0])
async def test_a_node_joins_with_its_platforms_token_and_a_clock_that_is_minutes_off(
    tmp_path: Path, late_s: float
) -> None:
    token = issue(tmp_path, late_s=late_s)
    gateway = Secured(tmp_path / "data", FANLIGHT_GATEWAY_ISSUERS_FILE=str(tmp_path / "issuers.toml"))
    await gateway.start()
    environ = {
        "FANLIGHT_WORKER_GATEWAY": gateway.address,
        "FANLIGHT_TLS_CA_FILE": str(gateway.authority),
        "FANLIGHT_WORKER_IDENTITY_TOKEN_FILE": str(token),
        "FANLIGHT_WORKER_STATE_DIR": str(tmp_path / "state"),
    }
    async with gateway.client() as client, worker(tmp_path / "worker.log", environ):
        await live_workers(client)
        (node,) = await client.nodes.list()
    await gateway.stop()
    assert (node.proof, node.subject, node.grant.pool) == ("cluster", "8f14e45f", "cluster")


def certified(folder: Path, authority: trustme.CA, role: str) -> dict[str, str]:
    """Settings of a certificate with that role."""
    made = authority.issue_cert(f"{role}.example", common_name=role, organization_unit_name=role)
    chain, key = folder / f"{role}.pem", folder / f"{role}.key"
    chain.write_bytes(made.cert_chain_pems[0].bytes())
    key.write_bytes(made.private_key_pem.bytes())
    return {"FANLIGHT_TLS_CERT_FILE": str(chain), "FANLIGHT_TLS_KEY_FILE": str(key)}


async def test_with_mutual_tls_a_workers_certificate_joins_and_the_operators_commands_show_theirs(
    tmp_path: Path,
) -> None:
    authority = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    gateway = Secured(tmp_path / "data", FANLIGHT_TLS_CLIENT_CA_FILE=str(tmp_path / "ca.pem"))
    await gateway.start()
    environ = {
        "FANLIGHT_WORKER_GATEWAY": gateway.address,
        "FANLIGHT_TLS_CA_FILE": str(gateway.authority),
        "FANLIGHT_WORKER_IDENTITY": "certificate",
        "FANLIGHT_WORKER_STATE_DIR": str(tmp_path / "state"),
    }
    ours = certified(tmp_path, authority, "operator")
    certificate = (Path(ours["FANLIGHT_TLS_CERT_FILE"]), Path(ours["FANLIGHT_TLS_KEY_FILE"]))
    with_it = AsyncClient(gateway.address, token=TOKEN, ca_file=gateway.authority, certificate=certificate)
    theirs = certified(tmp_path, authority, "worker")
    async with with_it as client, worker(tmp_path / "worker.log", {**environ, **theirs}):
        await live_workers(client)
        assert "certificate" in await gateway.command("nodes", "list", environ=ours)
        (node,) = await client.nodes.list()
    assert node.proof == "certificate"
    assert "CN=worker" in node.subject
    clients = certified(tmp_path, authority, "client")
    other = {**environ, **clients, "FANLIGHT_WORKER_STATE_DIR": str(tmp_path / "other")}
    assert await ended(tmp_path / "other.log", other) == 78
    assert "role is client" in (tmp_path / "other.log").read_text()
    await gateway.stop()


async def test_keys_are_managed_on_the_command_line_and_outlive_a_restart(gateway: Secured) -> None:
    secret = await gateway.command("keys", "create", "--tenant", "acme", "--role", "read", "--note", "for the wall")
    assert secret.startswith("flk_k")
    async with gateway.client(secret) as reader:
        assert await reader.list_jobs() == []
        with pytest.raises(CallFailed, match="does not let you submit jobs"):
            await reader.annotate("echo", PIXEL)
    listing = await gateway.command("keys", "list")
    assert "for the wall" in listing
    assert secret not in listing
    await gateway.stop(signal.SIGTERM)
    await gateway.start()
    key = secret.split("_")[1]
    renewed = await gateway.command("keys", "rotate", key, "--overlap", "1s")
    await gateway.command("keys", "revoke", key)
    async with gateway.client(secret) as ended, gateway.client(renewed) as reader:
        with pytest.raises(CallFailed, match="right token"):
            await ended.list_jobs()
        assert await reader.list_jobs() == []
