"""A key that is revoked ends the streams that it opened, over HTTP and over gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest

from fanlight.audit_log.v1 import audit_log_pb2, audit_log_pb2_grpc
from fanlight.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from services.gateway.app.keys import CreatedKey
from services.gateway.app.tenants import OPERATOR, Caller, callers_of
from services.gateway.domain.job import DIFFUSION, Job
from services.gateway.domain.keys import KeyRole
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.kernel.config import GatewayCommonSettings
from tests.fakes.fleet import Fleet, generation
from tests.fakes.http_serving import serving as serving_http
from tests.fakes.rpc_gateway import serving as serving_rpc

TOKEN = "operator-0123456789"
ACME = Caller(tenant="acme")


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as running:
        await running.worker(DIFFUSION).come()
        yield running


async def a_key(fleet: Fleet, role: KeyRole) -> CreatedKey:
    tenant = "default" if role is KeyRole.OPERATOR else "acme"
    return await fleet.gateway.keys.create(OPERATOR, tenant=tenant, role=role, note="", ttl_s=0.0)


async def a_job(fleet: Fleet) -> Job:
    return await fleet.gateway.jobs.create(generation(), ACME)


@asynccontextmanager
async def http(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    callers = callers_of(TOKEN, [], fleet.gateway.keys)
    fleet.gateway.keys.use_tokens(callers.tokens)
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers, heartbeat_s=0.02))
    async with serving_http(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield client


@pytest.mark.parametrize("role", [KeyRole.READ, KeyRole.OPERATOR])
async def test_a_stream_over_http_ends_with_its_key(fleet: Fleet, role: KeyRole) -> None:
    async with http(fleet) as client:
        key, job = await a_key(fleet, role), await a_job(fleet)
        path = "/v1/audit-log?follow=true" if role is KeyRole.OPERATOR else f"/v1/{job.name}/events"
        headers = {"x-api-key": key.secret}
        async with client.stream("GET", path, headers=headers) as response, asyncio.timeout(10):
            assert response.status_code == 200
            parts = response.aiter_raw()
            await anext(parts)
            await fleet.gateway.keys.revoke(OPERATOR, key.key.id)
            async for _ in parts:
                pass
        assert (await client.get("/v1/jobs", headers=headers)).status_code == 401
        # Its places are free again.
        async with asyncio.timeout(10):
            while fleet.gateway.audit._followers or fleet.gateway.quotas._places:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.01)


async def test_a_streams_of_another_key_goes_on(fleet: Fleet) -> None:
    async with http(fleet) as client:
        key, other, job = await a_key(fleet, KeyRole.READ), await a_key(fleet, KeyRole.READ), await a_job(fleet)
        async with client.stream("GET", f"/v1/{job.name}/events", headers={"x-api-key": key.secret}) as response:
            parts = response.aiter_text()
            await anext(parts)
            await fleet.gateway.keys.revoke(OPERATOR, other.key.id)
            await fleet.gateway.jobs.cancel(job.name, ACME)
            async with asyncio.timeout(10):
                assert "STATE_CANCELLED" in "".join([part async for part in parts])


async def test_a_watch_over_grpc_gives_nothing_after_its_key(fleet: Fleet) -> None:
    settings = GatewayCommonSettings(drain_grace_s=0, client_token=TOKEN)
    async with serving_rpc(fleet, settings) as address, grpc.aio.insecure_channel(address) as channel:
        key, job = await a_key(fleet, KeyRole.READ), await a_job(fleet)
        call = gateway_pb2_grpc.JobServiceStub(channel).WatchJob(
            gateway_pb2.WatchJobRequest(name=job.name), metadata=_sent(key), timeout=10
        )
        assert (await call.read()).job.name == job.name
        await fleet.gateway.keys.revoke(OPERATOR, key.key.id)
        await fleet.gateway.jobs.cancel(job.name, ACME)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_audit_log_over_grpc_gives_nothing_after_its_key(fleet: Fleet) -> None:
    settings = GatewayCommonSettings(drain_grace_s=0, client_token=TOKEN)
    async with serving_rpc(fleet, settings) as address, grpc.aio.insecure_channel(address) as channel:
        key = await a_key(fleet, KeyRole.OPERATOR)
        call = audit_log_pb2_grpc.AuditLogServiceStub(channel).FollowAuditLog(
            audit_log_pb2.FollowAuditLogRequest(), metadata=_sent(key), timeout=10
        )
        await call.initial_metadata()
        await fleet.gateway.keys.revoke(OPERATOR, key.key.id)
        other = await a_key(fleet, KeyRole.READ)
        seen = []
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for entry in call:
                seen.append(entry.target)
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert f"keys/{other.key.id}" not in seen


def _sent(key: CreatedKey) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key.secret}"),)
