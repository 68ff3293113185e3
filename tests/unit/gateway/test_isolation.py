"""Two tenants and a passer-by: none finds anything of another one, on any path that can be read."""

import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import httpx
import pytest
from fastapi.routing import APIRoute

from fanlight.errors import FanlightError
from services.gateway.app.tenants import Caller, Tenant, callers_of
from services.gateway.app.webhooks import WebhookOptions
from services.gateway.domain.circuit_breaker import FAILURES_MAX
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Job
from services.gateway.domain.keys import KeyRole
from services.gateway.domain.machine import FAILURES_LIMIT
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.fleet import OTHER, STARTER, STARTER_CANNY, Fleet, FleetWorker, annotation, generation

TOKEN, ACME, GLOBEX = "operator-0123456789", "acme-0123456789-x", "globex-0123456789"
GLOBEX_CALLER, ACME_CALLER = Caller(tenant="globex"), Caller(tenant="acme")
# Every name that globex brings along has it.
MARK = "globex"
OPEN_TO_ALL = {"/healthz", "/readyz", "/docs", "/openapi.json"}


class NoSender:
    async def post(self, url: str, headers: object, body: bytes) -> int:
        return 204


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet(settings={"blob_budget_bytes": 1_000_000}).running() as running:
        options = WebhookOptions(sender=NoSender(), payload=lambda job: b"{}", default_key=b"k" * 32)
        running.gateway.use_webhooks(options)
        yield running


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    tenants = [Tenant(name="acme", token=ACME), Tenant(name="globex", token=GLOBEX)]
    callers = callers_of(TOKEN, tenants, fleet.gateway.keys)
    fleet.gateway.keys.use_tokens(callers.tokens)
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        client.routes = list(routes_of(app))  # type: ignore[attr-defined]
        yield client


def routes_of(app: object) -> Iterator[APIRoute]:
    for router in app.routes:  # type: ignore[attr-defined]
        for route in getattr(router, "original_router", app).routes:
            if isinstance(route, APIRoute) and {"GET", "HEAD"} & set(route.methods or ()):
                yield route


async def workers(fleet: Fleet) -> tuple[FleetWorker, FleetWorker]:
    models = (STARTER, replace(OTHER, id="other"), STARTER_CANNY)
    painter, annotator = fleet.worker(DIFFUSION, models=models), fleet.worker(PREPROCESS)
    await painter.come()
    await annotator.come()
    return painter, annotator


async def busy_globex(fleet: Fleet, painter: FleetWorker, annotator: FleetWorker) -> tuple[Job, Job]:
    """It leaves traces of every kind: jobs of every state, a dead letter, blobs, a key, a record, models on nodes."""
    create = fleet.gateway.jobs.create
    done = await create(generation(prompt="globex's fox", request_id="globex-1"), GLOBEX_CALLER)
    await painter.work()
    dead = await create(annotation("globex"), GLOBEX_CALLER)
    for _ in range(FAILURES_LIMIT):
        fleet.rest()
        await annotator.come()
        [task] = await annotator.lease()
        await annotator.fail(task)
    for number in range(3):
        await create(generation(prompt=f"globex {number}", request_id=f"globex-w{number}"), GLOBEX_CALLER)
    await painter.lease()
    await fleet.gateway.quotas.change("globex", lambda tenant: replace(tenant, note="globex pays", pool=""))
    await fleet.gateway.keys.create(GLOBEX_CALLER, tenant="globex", role=KeyRole.READ, note="globex's", ttl_s=0.0)
    held = frozenset({"hf:globex/secret", "civitai:globex"})
    painter.worker = replace(painter.worker, vram_models=held, ram_models=held, unfetched_models=held)
    painter.disk = held | {"starter"}
    await painter.lease(limit=0)
    key = fleet.gateway.workers.key_of(painter.worker.id, DIFFUSION, "lora:hf:globex/secret")
    await fleet.gateway._core.circuit_breakers.note_failure(
        painter.worker.node, key, "GLOBEX_FAILED", lease_s=fleet.clock.now_s(), weight=FAILURES_MAX
    )
    fleet.gateway.workers.refresh(painter.worker.id)
    return done, dead


def filled(path: str, done: Job, dead: Job) -> Iterator[str]:
    """The path with globex's own names in the places of its parameters."""
    blob = done.tasks[0].outputs[0].blob.digest if done.tasks[0].outputs else "sha256:" + "0" * 64
    for job in (done, dead):
        names = {"job_id": job.id, "number": "1", "digest": blob, "scope": "globex", "name": "globex"}
        yield "/".join(
            names.get(part.strip("{}").partition(":")[0], MARK) if "{" in part else part for part in path.split("/")
        )


async def test_no_path_that_can_be_read_shows_a_tenant_anything_of_another(
    fleet: Fleet, client: httpx.AsyncClient
) -> None:
    painter, annotator = await workers(fleet)
    done, dead = await busy_globex(fleet, painter, annotator)
    done = await fleet.gateway.jobs.get(done.name)
    assert done.tasks[0].outputs
    seen = 0
    for route in client.routes:  # type: ignore[attr-defined]
        for path in set(filled(route.path, done, dead)):
            for query in ("", "?scope=globex", "?tenant=globex"):
                answer = await client.get(path + query, headers={"X-Api-Key": ACME})
                # An error may repeat the path.
                shown = answer.text.replace(path, "").lower()
                assert MARK not in shown, (path + query, answer.text)
                assert done.id not in shown, (path + query, answer.text)
                assert "globex_failed" not in shown
                seen += answer.status_code == 200
    assert seen > 8


async def test_the_same_paths_show_the_operator_what_is_hidden_from_tenants(
    fleet: Fleet, client: httpx.AsyncClient
) -> None:
    painter, annotator = await workers(fleet)
    done, dead = await busy_globex(fleet, painter, annotator)
    for path in ("/v1/jobs", "/v1/workers", "/v1/tenants", "/v1/keys", "/v1/dead-letters", f"/v1/{done.name}"):
        answer = await client.get(path, headers={"X-Api-Key": TOKEN})
        assert MARK in answer.text, path
    assert (await client.get(f"/v1/{dead.name}", headers={"X-Api-Key": GLOBEX})).status_code == 200


FIGURES = ("/metrics", "/v1/queue", "/v1/quota", "/v1/jobs", "/v1/dead-letters", "/v1/keys", "/v1/models")


async def test_what_a_tenant_sees_does_not_change_with_anothers_work(fleet: Fleet, client: httpx.AsyncClient) -> None:
    await workers(fleet)
    own = await fleet.gateway.jobs.create(generation(model="starter", priority=-50), ACME_CALLER)

    async def look() -> dict[str, str]:
        headers = {"X-Api-Key": ACME}
        return {path: without_times((await client.get(path, headers=headers)).text) for path in FIGURES}

    async def ahead() -> tuple[int, int]:
        headers = {"X-Api-Key": ACME}
        explained = (await client.get(f"/v1/{own.name}/explain", headers=headers)).json()
        job = (await client.get(f"/v1/{own.name}", headers=headers)).json()
        return explained["tasks"][0].get("tasks_ahead", 0), job["estimate"].get("tasks_ahead", 0)

    assert await ahead() == (0, 0)
    before = await look()
    for number in range(5):
        job = generation(request_id=f"globex-{number}", priority=50, prompt="globex")
        await fleet.gateway.jobs.create(job, GLOBEX_CALLER)
    await fleet.gateway.jobs.create(annotation("globex"), GLOBEX_CALLER)
    assert await ahead() == (0, 0)
    after = await look()
    assert {path for path in FIGURES if before[path] != after[path]} == set()


def without_times(text: str) -> str:
    """Estimates are of the work before it, whoever's it is; quota counts its own calls."""
    text = re.sub(r'"estimate": ?{[^}]*}', "", text)
    return re.sub(r'"requests_per_s",[^}]*', "", text)


async def test_a_passer_by_reads_nothing(fleet: Fleet, client: httpx.AsyncClient) -> None:
    painter, annotator = await workers(fleet)
    done, dead = await busy_globex(fleet, painter, annotator)
    answered = set()
    for route in client.routes:  # type: ignore[attr-defined]
        for path in set(filled(route.path, done, dead)):
            for headers in ({}, {"X-Api-Key": "guessed-0123456789"}):
                answer = await client.get(path, headers=headers)
                assert MARK not in answer.text.replace(path, "").lower()
                if answer.status_code != 401:
                    answered.add(path)
    assert answered <= OPEN_TO_ALL


async def test_a_full_gateway_does_not_say_how_much_the_others_wait_for(fleet: Fleet) -> None:
    limits = replace(fleet.limits, waiting_tasks_total=2)
    small = Fleet(limits=limits)
    async with small.running():
        for _ in range(2):
            await small.gateway.jobs.create(generation(), GLOBEX_CALLER)
        with pytest.raises(FanlightError) as refused:
            await small.gateway.jobs.create(generation(), ACME_CALLER)
        assert refused.value.code == "RESOURCE_EXHAUSTED"
        assert not re.search(r"\d", refused.value.message)
