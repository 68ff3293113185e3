"""Tenants, batches, filters, dead letters, webhooks' logs and metrics over HTTP, on a real gateway in memory."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.app.tenants import Tenant, callers_of
from services.gateway.app.webhooks import WebhookOptions
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.machine import FAILURES_LIMIT
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from services.gateway.wire.answers import payload
from tests.fakes.fleet import Fleet, generation

OPERATOR, ACME, GLOBEX = "op", "a", "g"
TENANTS = [Tenant(name="acme", token=ACME), Tenant(name="globex", token=GLOBEX)]


class Deaf:
    async def post(self, url, headers, body) -> int:
        return 500


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with Fleet().running() as fleet:
        fleet.gateway.use_webhooks(WebhookOptions(sender=Deaf(), payload=payload, default_key=b"k" * 24))
        for stage in (PREPROCESS, DIFFUSION):
            await fleet.worker(stage).come()
        yield fleet


@pytest.fixture
async def http(fleet: Fleet) -> AsyncIterator[httpx.AsyncClient]:
    app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=callers_of(OPERATOR, TENANTS)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


def by(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def wish(prompt: str = "a fox", **fields: object) -> dict:
    return {"generation": {"prompt": prompt}, **fields}


async def test_a_tenants_jobs_and_blobs_are_its_own(http: httpx.AsyncClient) -> None:
    made = (await http.post("/v1/jobs", json=wish(), headers=by(ACME))).json()
    assert made["tenant"] == "acme"
    statuses = [(await http.get(f"/v1/{made['name']}", headers=by(token))).status_code for token in (ACME, GLOBEX, "x")]
    assert statuses == [200, 404, 401]
    assert (await http.get(f"/v1/{made['name']}/events", headers=by(GLOBEX))).status_code == 404
    blob = (await http.post("/v1/blobs", content=b"secret", headers=by(ACME))).json()
    assert blob["scope"] == "acme"
    path = f"/v1/blobs/{blob['digest']}"
    assert (await http.get(path, headers=by(ACME))).content == b"secret"
    assert (await http.get(path, headers=by(GLOBEX))).status_code == 404
    assert (await http.get(f"{path}?scope=acme", headers=by(GLOBEX))).status_code == 404
    assert (await http.get(f"{path}?scope=acme", headers=by(OPERATOR))).status_code == 200


async def test_a_batch_refuses_only_what_is_wrong(http: httpx.AsyncClient) -> None:
    wishes = {"requests": [wish(), wish(request_id="r"), {"generation": {"model": "none"}}, {}]}
    results = (await http.post("/v1/jobs:batch", json=wishes, headers=by(ACME))).json()["results"]
    assert ["job" in each for each in results] == [True, True, False, False]
    assert [each["failure"]["reason"] for each in results[2:]] == ["NOT_FOUND", "INVALID_FIELD"]
    assert results[2]["failure"]["field"] == "generation.model"
    assert (await http.post("/v1/jobs:batch", json={"requests": []}, headers=by(ACME))).status_code == 400


async def test_an_entry_that_cannot_be_read_refuses_only_itself(http: httpx.AsyncClient) -> None:
    deep: object = 1
    for _ in range(48):
        deep = {"a": deep}
    use = {"annotator": "canny", "parameters": {"a": deep}}
    wishes = [
        wish(),
        {"generation": {"promt": "x"}},
        {"generation": {"steps": "many"}},
        None,
        {"generation": {"controls": [{"made_by": use}]}},
        wish(),
    ]
    response = await http.post("/v1/jobs:batch", json={"requests": wishes}, headers=by(ACME))
    assert response.status_code == 200
    results = response.json()["results"]
    assert ["job" in each for each in results] == [True, False, False, False, False, True]
    assert [each["failure"]["field"] for each in results[1:5]] == [
        "generation.promt",
        "generation.steps",
        "requests[3]",
        "generation.controls[0].made_by.parameters",
    ]
    assert {each["failure"]["reason"] for each in results[1:5]} == {"INVALID_FIELD"}


@pytest.mark.parametrize(
    ("batch", "field"),
    [
        ({"requests": {}}, "requests"),
        ({"requests": None}, "requests"),
        ({"requests": "x"}, "requests"),
        ({}, "requests"),
        ([], "body"),
        ({"requests": [wish()], "request": 1}, "request"),
        ({"requests": [wish()] * 1_001}, "requests"),
    ],
)
async def test_what_is_no_batch_is_refused_whole(http: httpx.AsyncClient, batch: object, field: str) -> None:
    response = await http.post("/v1/jobs:batch", json=batch, headers=by(ACME))
    assert (response.status_code, response.json()["error"]["field"]) == (400, field)


async def test_a_query_parameter_is_given_once(http: httpx.AsyncClient) -> None:
    made = (await http.post("/v1/jobs", json=wish(), headers=by(ACME))).json()
    for path, field in (
        ("/v1/jobs?page_size=1&page_size=2", "page_size"),
        (f"/v1/{made['name']}?wait=1&wait=1", "wait"),
    ):
        response = await http.get(path, headers=by(ACME))
        assert (response.status_code, response.json()["error"]["field"]) == (400, field)


async def test_lists_are_filtered(fleet: Fleet, http: httpx.AsyncClient) -> None:
    await http.post("/v1/jobs", json=wish(), headers=by(ACME))
    fleet.clock.advance(3_600)
    later = wish("later")
    later["generation"]["model"] = "other"
    await http.post("/v1/jobs", json=later, headers=by(GLOBEX))

    async def prompts(query: str) -> list[str]:
        page = (await http.get(f"/v1/jobs?{query}", headers=by(OPERATOR))).json()
        return [job["generation"]["prompt"] for job in page.get("jobs", [])]

    assert await prompts("model=other") == ["later"]
    assert await prompts("tenant=acme") == ["a fox"]
    assert await prompts("annotator=canny") == []
    assert await prompts("created_from_time=1970-01-12T14:00:00Z") == ["later"]
    assert await prompts("created_before_time=1970-01-12T14:00:00") == ["a fox"]


async def test_a_deadline_is_shown_and_must_be_sensible(http: httpx.AsyncClient) -> None:
    made = (await http.post("/v1/jobs", json=wish(deadline_s=60), headers=by(ACME))).json()
    assert made["deadline_time"].startswith("1970-01-12T13:47:40")
    assert (await http.post("/v1/jobs", json=wish(deadline_s=-1), headers=by(ACME))).status_code == 400


async def test_dead_letters_are_listed_shown_and_redriven(fleet: Fleet, http: httpx.AsyncClient) -> None:
    made = (await http.post("/v1/jobs", json=wish(), headers=by(ACME))).json()
    worker = fleet.worker(DIFFUSION)
    for _ in range(FAILURES_LIMIT):
        (task,) = await worker.lease()
        await worker.fail(task)
        fleet.rest()
    (letter,) = (await http.get("/v1/dead-letters", headers=by(ACME))).json()["letters"]
    assert letter["task"] == f"{made['name']}/tasks/1"
    assert (await http.get("/v1/dead-letters", headers=by(GLOBEX))).json().get("letters", []) == []
    path = f"/v1/dead-letters/{letter['task']}"
    shown = (await http.get(path, headers=by(ACME))).json()
    assert [attempt["failure"]["message"] for attempt in shown["attempts"]] == ["out of memory"] * FAILURES_LIMIT
    assert (await http.post(f"{path}:redrive", headers=by(GLOBEX))).status_code == 404
    assert (await http.post(f"{path}:redrive", headers=by(ACME))).json()["state"] == "STATE_QUEUED"
    assert (await http.post(f"{path}:redrive", headers=by(ACME))).status_code == 404


@pytest.mark.parametrize("url", ["ftp://a/", "http://", "http://user:pw@example.com/", "http://10.0.0.1/", "x" * 3_000])
async def test_a_webhook_with_an_invalid_url_is_refused(http: httpx.AsyncClient, url: str) -> None:
    answer = await http.post("/v1/jobs", json=wish(webhook_url=url), headers=by(ACME))
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]["field"] == "webhook_url"


async def test_a_webhooks_log_is_shown_to_its_tenant(fleet: Fleet, http: httpx.AsyncClient) -> None:
    made = (await http.post("/v1/jobs", json=wish(webhook_url="https://example.com/h"), headers=by(ACME))).json()
    assert (await http.get(f"/v1/{made['name']}/webhook", headers=by(ACME))).status_code == 404
    await fleet.worker(DIFFUSION).work()
    async with asyncio.TaskGroup() as group:
        await asyncio.sleep(0)
        await fleet.gateway._core.webhooks.run(group)
    log = (await http.get(f"/v1/{made['name']}/webhook", headers=by(ACME))).json()
    assert (log["state"], [each["status"] for each in log["tries"]]) == ("STATE_PENDING", [500])
    assert (await http.get(f"/v1/{made['name']}/webhook", headers=by(GLOBEX))).status_code == 404


async def test_metrics_are_prometheus_text(fleet: Fleet, http: httpx.AsyncClient) -> None:
    await fleet.gateway.jobs.create(replace(generation()))
    text = (await http.get("/metrics", headers=by(OPERATOR))).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(each.name, *each.labels.values()): each.value for each in samples}
    assert found["fanlight_cache_hits_total",] == 0
    assert found["fanlight_workers_live", "diffusion"] == 1
    [waiting] = [each for each in samples if each.name == "fanlight_queue_waiting"]
    assert (waiting.labels, waiting.value) == ({"stage": "diffusion", "checkpoint": "starter"}, 1)


async def test_a_waiting_job_is_explained_to_its_tenant_and_estimated_wherever_it_is_told(
    http: httpx.AsyncClient, fleet: Fleet
) -> None:
    made = (await http.post("/v1/jobs", json=wish(), headers=by(ACME))).json()
    again = (await http.get(f"/v1/{made['name']}", headers=by(ACME))).json()
    [listed] = (await http.get("/v1/jobs", headers=by(ACME))).json()["jobs"]
    explained = await http.get(f"/v1/{made['name']}/explain", headers=by(ACME))
    assert explained.status_code == 200
    assert explained.json()["summary"].startswith("task 1 waits: ")
    [task] = explained.json()["tasks"]
    assert task["workers"][0]["verdict"] == "planned"
    [result] = (await http.post("/v1/jobs:batch", json={"requests": [wish()]}, headers=by(ACME))).json()["results"]
    ready_s = {each["estimate"]["ready_s"] for each in (made, again, listed, explained.json(), result["job"])}
    assert all(each > 0 for each in ready_s)
    assert (await http.get(f"/v1/{made['name']}/explain", headers=by(GLOBEX))).status_code == 404
    assert (await http.get("/v1/jobs/none/explain", headers=by(ACME))).status_code == 404
