"""What Prometheus reads from the gateway, on a real gateway in memory."""

from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.app.control_cache import CacheFigures
from services.gateway.app.gateway import Gateway
from services.gateway.app.tenants import Caller, Tenant, callers_of
from services.gateway.domain.job import DIFFUSION
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.fleet import Fleet, generation

HITS = 12_345_678
FIGURES = CacheFigures(entries=1_234_567, size_bytes=2**40 + 1, budget_bytes=2**41, hits=HITS, misses=0)


TOKENS = {"acme": "a", "globex": "g", "operator": "o"}
CALLERS = callers_of("o", [Tenant(name=name, token=TOKENS[name]) for name in ("acme", "globex")])


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with Fleet().running() as fleet:
        app = http_app(fleet.gateway, fleet.blobs, HttpOptions())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            yield client


def samples_of(text: str) -> dict[str, float]:
    return {each.name: each.value for family in text_string_to_metric_families(text) for each in family.samples}


async def test_counts_above_a_million_are_exact(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gateway, "cache_figures", FIGURES)
    samples = samples_of((await http.get("/metrics")).text)
    assert samples["fanlight_cache_hits_total"] == HITS
    assert samples["fanlight_cache_entries"] == FIGURES.entries
    assert samples["fanlight_cache_bytes"] == FIGURES.size_bytes


async def test_the_answer_is_in_the_form_that_was_asked_for(http: httpx.AsyncClient) -> None:
    plain = await http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    modern = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in openmetrics_families(modern.text)}
    assert {"fanlight_cache_hits", "fanlight_queue_waiting", "fanlight_workers_live"} <= names


async def test_gateways_of_one_process_have_figures_of_their_own(http: httpx.AsyncClient) -> None:
    async with Fleet().running() as other:
        http_app(other.gateway, other.blobs, HttpOptions())
        assert "process_cpu_seconds_total" not in samples_of((await http.get("/metrics")).text)
        assert not any(family.name.startswith("fanlight_") for family in REGISTRY.collect())


async def test_a_tenant_sees_no_load_of_others_and_the_operator_all() -> None:
    async with Fleet().running() as fleet:
        await fleet.worker(DIFFUSION).come()
        for tenant, count in (("acme", 1), ("globex", 2)):
            for _ in range(count):
                await fleet.gateway.jobs.create(generation(), Caller(tenant=tenant))
        app = http_app(fleet.gateway, fleet.blobs, HttpOptions(callers=CALLERS))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            seen = {}
            for name, token in TOKENS.items():
                answer = await client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
                seen[name] = samples_of(answer.text)
            assert (await client.get("/metrics")).status_code == 401
    assert {name: each["fanlight_queue_waiting"] for name, each in seen.items()} == {
        "acme": 1,
        "globex": 2,
        "operator": 3,
    }
    assert {name for name, each in seen.items() if "fanlight_cache_hits_total" in each} == {"operator"}
