"""/v1/jobs/{id}/events, over a real server: in-process transports do not stream."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import httpx
import pytest

from services.gateway.app.watch import TaskProgress
from services.gateway.domain.job import Job, JobState
from services.gateway.http.app import http_app
from services.gateway.http.bodies import HttpOptions
from tests.fakes.gateway import FakeGateway, a_job
from tests.fakes.http_serving import serving
from tests.fakes.memory_blobs import MemoryBlobs


@dataclass(frozen=True)
class Event:
    kind: str
    id: str
    data: dict[str, object]


@pytest.fixture
def job(gateway: FakeGateway) -> Job:
    job = a_job("1")
    gateway.jobs.change(job)
    return job


@pytest.fixture
async def client(gateway: FakeGateway) -> AsyncIterator[httpx.AsyncClient]:
    app = http_app(gateway, MemoryBlobs(), HttpOptions(heartbeat_s=0.02))
    async with serving(app) as url, httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield client


@asynccontextmanager
async def watching(client: httpx.AsyncClient, last_event_id: str = "") -> AsyncIterator[AsyncIterator[str]]:
    headers = {"last-event-id": last_event_id} if last_event_id else {}
    async with client.stream("GET", "/v1/jobs/1/events", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response.aiter_lines()


async def next_event(lines: AsyncIterator[str]) -> Event:
    kind = id_ = ""
    async with asyncio.timeout(10):
        async for line in lines:
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "id":
                id_ = value
            elif name == "data":
                return Event(kind, id_, json.loads(value))
    raise AssertionError("the stream ended")


async def rest(lines: AsyncIterator[str]) -> list[str]:
    async with asyncio.timeout(10):
        return [line async for line in lines if line and not line.startswith(":")]


def ended(job: Job, revision: int) -> Job:
    return replace(job, state=JobState.SUCCEEDED, revision=revision)


async def test_states_come_with_the_revision_as_id_until_the_job_has_ended(
    client: httpx.AsyncClient, gateway: FakeGateway, job: Job
) -> None:
    async with watching(client) as lines:
        first = await next_event(lines)
        assert (first.kind, first.id, first.data["state"]) == ("job", "1", "STATE_QUEUED")
        gateway.jobs.change(ended(job, revision=5))
        second = await next_event(lines)
        assert (second.kind, second.id, second.data["state"]) == ("job", "5", "STATE_SUCCEEDED")
        assert await rest(lines) == []


async def test_progress_comes_without_an_id(client: httpx.AsyncClient, gateway: FakeGateway, job: Job) -> None:
    async with watching(client) as lines:
        await next_event(lines)
        gateway.jobs.progress(job.name, TaskProgress(task=1, step=3, steps=20, preview=b"\xff\xd8\xff"))
        event = await next_event(lines)
        assert (event.kind, event.id) == ("progress", "")
        assert event.data == {
            "task": 1,
            "step": 3,
            "steps": 20,
            "preview": "/9j/",
            "preview_media_type": "image/jpeg",
        }


async def test_a_watcher_goes_on_after_the_last_state_it_saw(
    client: httpx.AsyncClient, gateway: FakeGateway, job: Job
) -> None:
    async with watching(client, last_event_id="1") as lines:
        gateway.jobs.change(ended(job, revision=2))
        assert (await next_event(lines)).id == "2"
    async with watching(client, last_event_id="1") as lines:
        assert (await next_event(lines)).id == "2"
        assert await rest(lines) == []


async def test_a_watcher_that_saw_the_end_does_not_reconnect(
    client: httpx.AsyncClient, gateway: FakeGateway, job: Job
) -> None:
    gateway.jobs.change(ended(job, revision=2))
    response = await client.get("/v1/jobs/1/events", headers={"last-event-id": "2"})
    assert (response.status_code, response.content) == (204, b"")


async def test_a_silent_stream_shows_that_it_lives(client: httpx.AsyncClient, job: Job) -> None:
    async with watching(client) as lines:
        await next_event(lines)
        async with asyncio.timeout(10):
            async for line in lines:
                if line == ": alive":
                    return


async def test_a_stopping_gateway_ends_the_stream(client: httpx.AsyncClient, gateway: FakeGateway, job: Job) -> None:
    async with watching(client) as lines:
        await next_event(lines)
        gateway.jobs.stop()
        assert await rest(lines) == []


async def test_an_error_in_the_middle_is_an_event(client: httpx.AsyncClient, gateway: FakeGateway, job: Job) -> None:
    async with watching(client) as lines:
        await next_event(lines)
        del gateway.jobs.kept[job.name]
        gateway.jobs.progress(job.name, TaskProgress(task=1, step=1, steps=2))
        event = await next_event(lines)
        assert event.kind == "error"
        assert event.data["error"]["reason"] == "NOT_FOUND"


async def test_a_job_that_is_not_there_is_not_found(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/jobs/9/events")).status_code == 404


@pytest.mark.parametrize("header", ["x", "-1", "1.5", "99999999999999999999999"])
async def test_an_id_that_was_never_one_is_refused(client: httpx.AsyncClient, job: Job, header: str) -> None:
    response = await client.get("/v1/jobs/1/events", headers={"last-event-id": header})
    assert response.status_code == 400
    assert response.json()["error"]["field"] == "Last-Event-ID"


async def test_a_watcher_that_goes_away_is_forgotten(client: httpx.AsyncClient, gateway: FakeGateway, job: Job) -> None:
    async with watching(client) as first, watching(client) as second:
        await next_event(first)
        await next_event(second)
        assert gateway.jobs.watchers == 2
    async with asyncio.timeout(10):
        await gateway.jobs.unwatched.wait()
