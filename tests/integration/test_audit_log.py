"""Over processes: who did what is logged and verified, and a tenant's deletion goes on after a kill."""

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fanlight.client import AsyncClient
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import CallFailed
from fanlight.keys.v1 import keys_pb2
from services.gateway.__main__ import STORE_FILE
from tests.fakes.gateway_process import GatewayProcess, RpcWorker
from tests.fakes.secured_gateway import until

OPERATOR, WORKER = "operator-0123456789", "worker-0123456789abc"
PATIENCE_S = 60.0
JOBS = 150


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    process = GatewayProcess(tmp_path / "data", FANLIGHT_CLIENT_TOKEN=OPERATOR, FANLIGHT_WORKER_TOKEN=WORKER)
    await process.start()
    yield process
    await process.stop(signal.SIGKILL)


async def command(gateway: GatewayProcess, *arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fanlight.cli.main", *arguments),
        env={**os.environ, "FANLIGHT_GATEWAY": gateway.grpc, "FANLIGHT_TOKEN": OPERATOR},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        printed, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode() + said.decode()


async def acme(client: AsyncClient) -> str:
    """A key of the tenant's."""
    return (await client.keys.create(tenant="acme", role=keys_pb2.Key.ROLE_ADMIN)).secret


@pytest.mark.timeout(180)
async def test_the_log_is_listed_and_verified_and_a_change_in_the_store_is_found(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    async with AsyncClient(gateway.grpc, token=OPERATOR) as client:
        secret = await acme(client)
        await client.tenants.set("acme", weight=2.0)
    code, printed = await command(gateway, "audit-log", "list", "--json")
    events = [json.loads(line) for line in printed.splitlines()]
    assert code == 0
    assert [event["type"] for event in events] == ["io.fanlight.audit.tenants.set", "io.fanlight.audit.keys.create"]
    actor = events[0]["data"]["actor"]
    assert (actor["role"], actor["tenant"], actor["address"]) == ("operator", "default", "127.0.0.1")
    assert secret not in printed
    heads = tmp_path / "heads.json"
    code, printed = await command(gateway, "audit-log", "verify", "--heads", str(heads))
    assert (code, "whole" in printed) == (0, True)
    # Another process of the gateway has another chain.
    await gateway.stop(signal.SIGKILL)
    await gateway.start()
    async with AsyncClient(gateway.grpc, token=OPERATOR) as client:
        await client.tenants.set("acme", weight=3.0)
    code, printed = await command(gateway, "audit-log", "verify", "--heads", str(heads))
    assert (code, "2 chains: whole" in printed) == (0, True)
    await gateway.stop()
    change_in_store(gateway.data / STORE_FILE)
    await gateway.start()
    code, printed = await command(gateway, "audit-log", "verify")
    assert (code, "was changed" in printed) == (1, True)


def change_in_store(file: Path) -> None:
    """Somebody with the disk hides whose key it was."""
    with sqlite3.connect(file) as store:
        found = store.execute("SELECT key, value FROM records WHERE bucket = 'audit_log'").fetchall()
        for key, value in found:
            if b"keys.create" in value:
                changed = value.replace(b'"target_tenant":"acme"', b'"target_tenant":"evil"')
                assert changed != value
                store.execute("UPDATE records SET value = ? WHERE bucket = 'audit_log' AND key = ?", (changed, key))
    store.close()


@pytest.mark.timeout(180)
async def test_a_tenants_deletion_goes_on_after_a_kill(gateway: GatewayProcess) -> None:
    async with AsyncClient(gateway.grpc, token=OPERATOR) as client, gateway.channel(WORKER) as channel:
        secret = await acme(client)
        await RpcWorker(channel, "diffusion").lease(0)
        async with AsyncClient(gateway.grpc, token=secret) as tenant:
            work = diffusion_pb2.GenerateRequest(prompt="a teapot")
            jobs = [await tenant.create_job(work, request_id=str(number)) for number in range(JOBS)]
            await tenant.write_blob(b"an image of somebody")
        deleting = asyncio.create_task(client.tenants.delete("acme"))
        await until(lambda: client.tenants.get("acme"), lambda each: each.HasField("deletion"))
        await gateway.stop(signal.SIGKILL)
        deleting.cancel()
        await asyncio.wait({deleting})
    await gateway.start()
    async with AsyncClient(gateway.grpc, token=OPERATOR) as client:
        record = await until(lambda: client.tenants.get("acme"), lambda each: each.deletion.HasField("end_time"))
        assert record.deletion.remains
        with pytest.raises(CallFailed) as refused:
            await client.get_job(jobs[0].name)
        assert refused.value.code == "NOT_FOUND"
        assert await client.list_jobs() == []
        assert (await client.audit_log.verify()).faults == []
        async with AsyncClient(gateway.grpc, token=secret) as tenant:
            with pytest.raises(CallFailed) as refused:
                await tenant.list_jobs()
            assert refused.value.code == "UNAUTHENTICATED"
    code, printed = await command(gateway, "tenants", "show", "acme")
    assert (code, "deleted: " in printed, "remains: " in printed) == (0, True, True)
    assert not list((gateway.data / "blobs" / "acme").glob("??/*"))
