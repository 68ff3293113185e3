"""A gateway with its own certificate, and workers that join it with a code: real processes, as on two machines."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from fanlight.client import AsyncClient
from fanlight.contract.join_code import parse_join_code
from fanlight.errors import CallFailed
from fanlight.gateway.v1.gateway_pb2 import WorkerStatus
from tests.fakes.gateway_process import GatewayProcess

PATIENCE_S = 60.0
TOKEN = "operator-token"
# A PNG of one pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)


class Secured(GatewayProcess):
    """Listens everywhere, so that it has TLS; called at loopback."""

    def __init__(self, data: Path, **environment: str) -> None:
        super().__init__(data, FANLIGHT_CLIENT_TOKEN=TOKEN, **environment)
        self.grpc = self.http = "0.0.0.0:0"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc.rpartition(':')[2]}"

    @property
    def authority(self) -> Path:
        return self.data / "tls" / "authority.pem"

    def client(self) -> AsyncClient:
        return AsyncClient(self.address, token=TOKEN, ca_file=self.authority)

    async def command(self, *arguments: str) -> str:
        environ = {"FANLIGHT_GATEWAY": self.address, "FANLIGHT_TOKEN": TOKEN}
        environ["FANLIGHT_TLS_CA_FILE"] = str(self.authority)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fanlight.cli.main", *arguments),
            env={**os.environ, **environ},
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE_S):
            printed, _ = await process.communicate()
        assert process.returncode == 0
        return printed.decode().strip()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Secured]:
    (tmp_path / "gateway").mkdir()
    process = Secured(tmp_path / "gateway" / "data")
    await process.start()
    yield process
    await process.stop()


@contextlib.asynccontextmanager
async def worker(log: Path, environ: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.worker_process"),
        env={**os.environ, "FANLIGHT_DRAIN_GRACE_S": "1", **environ},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=log.open("ab"),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()


async def live_workers(client: AsyncClient, count: int = 1) -> list[WorkerStatus]:
    async with asyncio.timeout(PATIENCE_S):
        while len(found := [each for each in await client.list_workers() if each.live]) < count:
            await asyncio.sleep(0.1)
    return found


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
                (status,) = await live_workers(client)
                job = await client.annotate("echo", PIXEL)
                assert await client.read_blob(job.images[0].blob) == PIXEL
            (node,) = await client.nodes.list()
            assert status.worker.id.startswith(f"{node.id}-preprocess-")
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
    with socket.create_connection(("127.0.0.1", http_port), timeout=10) as connection:
        with context.wrap_socket(connection, server_hostname="127.0.0.1") as secure:
            assert secure.version() == "TLSv1.3"
    async with AsyncClient(gateway.address, token=TOKEN, connect_s=0.1, timeout_s=5) as client:
        with pytest.raises(CallFailed):
            await client.list_workers()
    assert oct(gateway.data.joinpath("tls").stat().st_mode & 0o777) == "0o700"


async def ended(log: Path, environ: Mapping[str, str]) -> tuple[int, str]:
    async with worker(log, environ) as process, asyncio.timeout(PATIENCE_S):
        code = await process.wait()
    return code, log.read_text()


async def test_a_worker_that_is_not_let_in_ends_with_the_reason(gateway: Secured, tmp_path: Path) -> None:
    code = parse_join_code(await gateway.command("nodes", "invite"))
    environ = {"FANLIGHT_WORKER_GATEWAY": gateway.address, "FANLIGHT_WORKER_STATE_DIR": str(tmp_path / "state")}
    forged = str(code).replace(code.secret, "0" * 64)
    exit_code, said = await ended(tmp_path / "forged.log", {**environ, "FANLIGHT_WORKER_JOIN_CODE": forged})
    assert exit_code == 78
    assert "does not let this node join" in said
    elsewhere = str(code).replace(code.authority, "0" * 64)
    exit_code, said = await ended(tmp_path / "elsewhere.log", {**environ, "FANLIGHT_WORKER_JOIN_CODE": elsewhere})
    assert exit_code == 78
    assert "shows another certificate" in said
    # The one code is still unused, and no try has printed a secret.
    for log in ("forged.log", "elsewhere.log"):
        assert code.secret not in (tmp_path / log).read_text()
    assert json.loads(await gateway.command("nodes", "invites", "--json"))[0].get("used", 0) == 0


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
        async with asyncio.timeout(PATIENCE_S):
            while len(nodes := await client.nodes.list()) < 2 or not nodes[0].workers:
                await asyncio.sleep(0.1)
    assert re.search(r"node_joined.*node_joined", (tmp_path / "worker.log").read_text(), re.DOTALL)
    assert {each.id for each in nodes} > {first.id}
