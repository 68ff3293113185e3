"""A tenant's limits: refused at its own, and nobody else notices."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from fanlight.errors import FanlightError, InvalidField, ResourceExhausted
from fanlight.tenants.v1 import tenants_pb2
from services.gateway.app.quotas import RATE_WINDOW_S
from services.gateway.app.tenants import OPERATOR, Caller, Tenant, callers_of
from services.gateway.app.webhooks import WebhookOptions
from services.gateway.config import GatewaySettings
from services.gateway.domain.job import DIFFUSION
from services.gateway.domain.tenants import LIMIT_NAMES, TenantLimits, TenantRecord
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.wire import tenants as wire
from tests.fakes.fleet import Fleet, generation

TOKEN, ACME_TOKEN, GLOBEX_TOKEN = "operator-0123456789", "acme-0123456789ab", "globex-0123456789"
ACME, GLOBEX = Caller(tenant="acme"), Caller(tenant="globex")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as running:
        await running.worker(DIFFUSION).come()
        yield running


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    tenants = [Tenant(name="acme", token=ACME_TOKEN), Tenant(name="globex", token=GLOBEX_TOKEN)]
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers_of(TOKEN, tenants)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        yield client


def by(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def grant(fleet: Fleet, tenant: str = "acme", **limits: float) -> None:
    request = tenants_pb2.SetTenantRequest(name=tenant, limits=tenants_pb2.TenantLimits(**limits))
    await fleet.gateway.quotas.change(tenant, wire.change(request))


def used(fleet: Fleet, name: str, tenant: str = "acme") -> float:
    return next(each.used for each in fleet.gateway.quotas.uses(tenant) if each.name == name)


async def test_who_fills_the_queue_is_refused_and_no_other(fleet: Fleet) -> None:
    await grant(fleet, waiting_tasks=3)
    create = fleet.gateway.jobs.create
    await create(generation(3), ACME)
    assert used(fleet, "waiting_tasks") == 3
    with pytest.raises(ResourceExhausted, match="waiting_tasks: your tenant has 3") as caught:
        await create(generation(), ACME)
    assert caught.value.retry_after_s > 0
    await create(generation(4), GLOBEX)
    await create(generation(4), OPERATOR)


async def test_ended_and_cancelled_tasks_give_their_places_back(fleet: Fleet) -> None:
    await grant(fleet, waiting_tasks=2)
    job = await fleet.gateway.jobs.create(generation(2), ACME)
    await fleet.gateway.jobs.cancel(job.name, ACME)
    assert used(fleet, "waiting_tasks") == 0
    await fleet.gateway.jobs.create(generation(2), ACME)


async def test_a_limit_below_what_is_used_refuses_more_and_ends_nothing(fleet: Fleet) -> None:
    job = await fleet.gateway.jobs.create(generation(5), ACME)
    await grant(fleet, waiting_tasks=1)
    with pytest.raises(ResourceExhausted):
        await fleet.gateway.jobs.create(generation(), ACME)
    assert not (await fleet.gateway.jobs.get(job.name, ACME)).state.ended


async def test_too_many_requests_of_one_tenant_are_refused_with_when_to_come_back(
    client: httpx.AsyncClient, fleet: Fleet
) -> None:
    await grant(fleet, requests_per_s=0.5)
    answers = [await client.get("/v1/jobs", headers=by(ACME_TOKEN)) for _ in range(8)]
    taken = int(0.5 * RATE_WINDOW_S)
    assert [each.status_code for each in answers] == [200] * taken + [429] * (8 - taken)
    assert answers[-1].headers["retry-after"] == "2"
    assert "requests_per_s" in answers[-1].text
    assert (await client.get("/v1/jobs", headers=by(GLOBEX_TOKEN))).status_code == 200
    assert (await client.get("/v1/jobs", headers=by(TOKEN))).status_code == 200
    await grant(fleet, requests_per_s=100)
    assert (await client.get("/v1/jobs", headers=by(ACME_TOKEN))).status_code == 200


async def test_streams_have_places_and_who_has_none_gets_the_job_as_it_is(fleet: Fleet) -> None:
    await grant(fleet, streams=1)
    jobs = fleet.gateway.jobs
    job = await jobs.create(generation(), ACME)
    watch = jobs.watch(job.name, caller=ACME)
    await anext(watch)
    assert used(fleet, "streams") == 1
    with pytest.raises(ResourceExhausted, match="streams: your tenant has 1 watches and waits"):
        await anext(jobs.watch(job.name, caller=ACME))
    assert (await jobs.wait(job.name, wait_s=60.0, caller=ACME)).id == job.id
    other = await jobs.create(generation(), GLOBEX)
    beside = jobs.watch(other.name, caller=GLOBEX)
    await anext(beside)
    await watch.aclose()
    await beside.aclose()
    assert used(fleet, "streams") == 0


async def test_a_tenant_whose_blobs_take_all_its_bytes_writes_no_more(client: httpx.AsyncClient, fleet: Fleet) -> None:
    await grant(fleet, blob_bytes=100)
    assert (await client.post("/v1/blobs", headers=by(ACME_TOKEN), content=PNG + b"x" * 92)).status_code == 201
    refused = await client.post("/v1/blobs", headers=by(ACME_TOKEN), content=PNG + b"y" * 50)
    assert (refused.status_code, "blob_bytes" in refused.text) == (429, True)
    assert (await client.post("/v1/blobs", headers=by(GLOBEX_TOKEN), content=PNG + b"y" * 50)).status_code == 201
    with pytest.raises(ResourceExhausted, match="blob_bytes"):
        await fleet.gateway.jobs.create(generation(), ACME)


async def test_uploads_have_places(fleet: Fleet) -> None:
    await grant(fleet, uploads=1)
    with fleet.gateway.quotas.upload(ACME, 10):
        with pytest.raises(ResourceExhausted, match="uploads"), fleet.gateway.quotas.upload(ACME, 10):
            pass
        with fleet.gateway.quotas.upload(GLOBEX, 10):
            assert used(fleet, "uploads") == 1
    assert used(fleet, "uploads") == 0


async def ended(fleet: Fleet, caller: Caller, count: int, webhook_url: str = "") -> list[str]:
    """Names of that many cancelled jobs, a second apart."""
    names = []
    for _ in range(count):
        job = await fleet.gateway.jobs.create(replace(generation(), webhook_url=webhook_url), caller)
        await fleet.gateway.jobs.cancel(job.name, caller)
        fleet.clock.advance(1.0)
        names.append(job.name)
    return names


async def kept(fleet: Fleet, caller: Caller) -> set[str]:
    return {job.name for job in (await fleet.gateway.jobs.list(page_size=0, page_token="", caller=caller)).jobs}


async def test_history_is_kept_by_each_tenants_own_count_and_age(fleet: Fleet) -> None:
    await grant(fleet, "acme", history_jobs=2)
    await grant(fleet, "globex", history_s=2.5)
    acme, globex = await ended(fleet, ACME, 5), await ended(fleet, GLOBEX, 5)
    mine = await ended(fleet, OPERATOR, 5)
    fleet.clock.advance(-5.0)
    await fleet.gateway.sweep()
    assert await kept(fleet, ACME) == set(acme[-2:])
    assert await kept(fleet, GLOBEX) == set(globex[-2:])
    assert set(mine) <= await kept(fleet, OPERATOR)


async def test_a_job_stays_until_its_webhook_is_delivered(fleet: Fleet) -> None:
    statuses = [503, 204]

    class Target:
        async def post(self, url: str, headers: object, body: bytes) -> int:
            return statuses.pop(0)

    fleet.gateway.use_webhooks(WebhookOptions(sender=Target(), payload=lambda job: b"{}", default_key=b"k" * 32))
    await grant(fleet, history_jobs=1)
    await ended(fleet, ACME, 1, "https://hooks.example/")
    last = await ended(fleet, ACME, 1)
    webhooks = fleet.gateway._core.webhooks
    for is_open in (True, False):
        async with asyncio.TaskGroup() as group:
            await webhooks.run(group)
        assert used(fleet, "webhooks") == is_open
        await fleet.gateway.sweep()
        assert len(await kept(fleet, ACME)) == 1 + is_open
        fleet.clock.advance(10.0)
    assert await kept(fleet, ACME) == set(last)


async def test_webhooks_that_wait_have_places(fleet: Fleet) -> None:
    class Target:
        async def post(self, url: str, headers: object, body: bytes) -> int:
            return 503

    fleet.gateway.use_webhooks(WebhookOptions(sender=Target(), payload=lambda job: b"{}", default_key=b"k" * 32))
    await grant(fleet, webhooks=1)
    await ended(fleet, ACME, 1, "https://hooks.example/")
    with pytest.raises(ResourceExhausted, match="webhooks: your tenant has 1 webhooks waiting"):
        await ended(fleet, ACME, 1, "https://hooks.example/")
    await ended(fleet, ACME, 1)
    await ended(fleet, GLOBEX, 1, "https://hooks.example/")


async def test_everybody_sees_their_own_quota_and_the_operator_all(client: httpx.AsyncClient, fleet: Fleet) -> None:
    await grant(fleet, streams=7)
    own = (await client.get("/v1/quota", headers=by(ACME_TOKEN))).json()
    lines = {each["name"]: each for each in own["lines"]}
    assert own["tenant"] == "acme"
    assert set(lines) == set(LIMIT_NAMES)
    assert (lines["streams"]["limit"], lines["streams"]["is_own"]) == (7, True)
    assert lines["waiting_tasks"]["limit"] == GatewaySettings().waiting_tasks_limit
    assert (await client.get("/v1/quota?tenant=acme", headers=by(GLOBEX_TOKEN))).status_code == 403
    assert (await client.get("/v1/quota?tenant=acme", headers=by(TOKEN))).json() == own


async def test_the_operator_sets_lists_and_shows_tenants_over_http(client: httpx.AsyncClient, fleet: Fleet) -> None:
    path = "/v1/tenants/acme"
    body = {"weight": 2.5, "service_class": 1, "pool": "trusted", "note": "pays", "limits": {"streams": 3}}
    made = (await client.patch(path, headers=by(TOKEN), json=body)).json()
    assert (made["weight"], made["pool"], made["limits"]) == (2.5, "trusted", {"streams": 3})
    changed = (await client.patch(path, headers=by(TOKEN), json={"clear_limits": ["streams"], "note": ""})).json()
    assert (changed["weight"], changed["limits"], changed["note"]) == (2.5, {}, "")
    assert changed["create_time"] == made["create_time"]
    listed = (await client.get("/v1/tenants", headers=by(TOKEN))).json()["tenants"]
    assert [each["name"] for each in listed] == ["acme"]
    assert (await client.get("/v1/tenants/nobody", headers=by(TOKEN))).json()["weight"] == 1
    for token in (ACME_TOKEN, GLOBEX_TOKEN):
        assert (await client.get("/v1/tenants", headers=by(token))).status_code == 403
        assert (await client.patch(path, headers=by(token), json={"weight": 100})).status_code == 403


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": 1e9}, "weight"),
        ({"service_class": 10}, "service_class"),
        ({"pool": "No Such"}, "pool"),
        ({"limits": {"streams": 0}}, "limits.streams"),
        ({"limits": {"requests_per_s": "NaN"}}, "limits.requests_per_s"),
        ({"limits": {"history_s": 0.5}}, "limits.history_s"),
        ({"clear_limits": ["nothing"]}, "clear_limits[0]"),
        ({"limits": {"streams": 2}, "clear_limits": ["streams"]}, "limits.streams"),
    ],
)
async def test_a_grant_that_makes_no_sense_is_refused_by_its_field(
    client: httpx.AsyncClient, body: dict[str, object], field: str
) -> None:
    refused = await client.patch("/v1/tenants/acme", headers=by(TOKEN), json=body)
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, field)


async def test_a_tenants_pool_binds_its_jobs(fleet: Fleet) -> None:
    await fleet.gateway.quotas.change("acme", wire.change(tenants_pb2.SetTenantRequest(name="acme", pool="trusted")))
    with pytest.raises(FanlightError, match="no worker of the pool trusted"):
        await fleet.gateway.jobs.create(generation(), ACME)
    await fleet.gateway.jobs.create(generation(), GLOBEX)


async def test_a_weight_and_a_class_order_what_waits_already(fleet: Fleet) -> None:
    await fleet.gateway.jobs.create(generation(6), GLOBEX)
    await fleet.gateway.jobs.create(generation(2), ACME)
    request = tenants_pb2.SetTenantRequest(name="acme", service_class=1)
    await fleet.gateway.quotas.change("acme", wire.change(request))
    index = fleet.gateway._core.queue_index
    index.release_due()
    queues = fleet.gateway._core.scheduler.queues
    [queue_id] = queues._queues
    assert [task.tenant for task in queues.first(queue_id, 4)] == ["acme", "acme", "globex", "globex"]


async def test_another_gateway_follows_a_tenants_record(fleet: Fleet) -> None:
    await grant(fleet, streams=9)
    [record] = await fleet.store.list("tenants", limit=10)
    other = Fleet().gateway.quotas
    other.take(record)
    assert other.limits_of("acme").streams == 9


def test_a_limit_that_is_unset_is_the_gateways() -> None:
    limits = TenantLimits(streams=3).over(TenantLimits(streams=5, uploads=7))
    assert (limits.streams, limits.uploads) == (3, 7)
    assert TenantRecord(name="x").limits == TenantLimits()


def test_an_unknown_limit_is_refused() -> None:
    with pytest.raises(InvalidField, match="must be one of waiting_tasks"):
        wire.change(tenants_pb2.SetTenantRequest(name="x", clear_limits=["speed"]))
