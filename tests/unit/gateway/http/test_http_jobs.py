"""/v1/jobs"""

import base64
import codecs
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from fanlight.contract.names import digest_of
from services.gateway.app.submission import NewJob
from services.gateway.domain.job import JobState
from tests.fakes.fleet import resolved
from tests.fakes.gateway import FakeGateway, a_job
from tests.fakes.memory_blobs import MemoryBlobs

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
TEAPOT = {"generation": {"prompt": "a teapot", "seed": 7, "count": 2}}
Client = httpx.AsyncClient


def controlled(image: dict[str, Any]) -> dict[str, Any]:
    return {"generation": {"prompt": "a teapot", "controls": [{"annotator": "canny", "image": image}]}}


def sources_of(new: NewJob) -> list[tuple[str, bytes, str]]:
    return [(each.field, each.data, each.digest) for each in new.draft.images]


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["reason"], error.get("field", "")


async def test_a_job_is_made_and_told(client: Client, gateway: FakeGateway) -> None:
    made = await client.post("/v1/jobs", json=TEAPOT)
    assert made.status_code == 201
    assert made.headers["location"] == "/v1/jobs/1"
    assert made.json()["name"] == "jobs/1"
    assert made.json()["state"] == "STATE_QUEUED"
    assert made.json()["generation"]["prompt"] == "a teapot"
    (new,) = gateway.jobs.created
    assert (resolved(new).seed, resolved(new).count) == (7, 2)
    assert (await client.get("/v1/jobs/1")).json() == made.json()


async def test_a_job_that_is_not_there_is_not_found(client: Client) -> None:
    for response in (
        await client.get("/v1/jobs/9"),
        await client.get("/v1/jobs/9?wait=1"),
        await client.post("/v1/jobs/9:cancel"),
    ):
        assert error_of(response)[:2] == (404, "NOT_FOUND")


@pytest.mark.parametrize(("header", "body", "wanted"), [("k1", "", "k1"), ("", "k2", "k2"), ("k3", "k3", "k3")])
async def test_the_idempotency_key_is_the_request_id(
    client: Client, gateway: FakeGateway, header: str, body: str, wanted: str
) -> None:
    headers = {"idempotency-key": header} if header else {}
    answers = [await client.post("/v1/jobs", json=TEAPOT | {"request_id": body}, headers=headers) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert [new.request_id for new in gateway.jobs.created] == [wanted]


async def test_a_key_that_contradicts_the_body_is_refused(client: Client) -> None:
    response = await client.post("/v1/jobs", json=TEAPOT | {"request_id": "a"}, headers={"idempotency-key": "b"})
    assert error_of(response) == (400, "INVALID_FIELD", "Idempotency-Key")


async def test_waiting_answers_with_the_ended_job(client: Client, gateway: FakeGateway) -> None:
    gateway.jobs.ending = replace(a_job("1"), state=JobState.SUCCEEDED)
    assert (await client.post("/v1/jobs?wait=5", json=TEAPOT)).json()["state"] == "STATE_SUCCEEDED"
    assert (await client.get("/v1/jobs/1?wait=60")).json()["state"] == "STATE_SUCCEEDED"


async def test_not_waiting_answers_at_once(client: Client, gateway: FakeGateway) -> None:
    gateway.jobs.ending = replace(a_job("1"), state=JobState.SUCCEEDED)
    assert (await client.post("/v1/jobs", json=TEAPOT)).json()["state"] == "STATE_QUEUED"


async def test_a_job_is_cancelled_and_cancelling_it_again_changes_nothing(client: Client) -> None:
    await client.post("/v1/jobs", json=TEAPOT)
    first = await client.post("/v1/jobs/1:cancel")
    assert first.json()["state"] == "STATE_CANCELLED"
    assert (await client.post("/v1/jobs/1:cancel")).json() == first.json()


async def test_jobs_are_listed_page_by_page(client: Client) -> None:
    for _ in range(3):
        await client.post("/v1/jobs", json=TEAPOT)
    first = (await client.get("/v1/jobs?page_size=2")).json()
    assert [job["name"] for job in first["jobs"]] == ["jobs/3", "jobs/2"]
    second = (await client.get("/v1/jobs", params={"page_size": 2, "page_token": first["next_page_token"]})).json()
    assert [job["name"] for job in second["jobs"]] == ["jobs/1"]
    assert second["next_page_token"] == ""


@pytest.mark.parametrize("state", ["cancelled", "STATE_CANCELLED", "Cancelled"])
async def test_jobs_are_listed_by_state(client: Client, state: str) -> None:
    await client.post("/v1/jobs", json=TEAPOT)
    await client.post("/v1/jobs", json=TEAPOT)
    await client.post("/v1/jobs/1:cancel")
    listed = (await client.get("/v1/jobs", params={"state": state})).json()
    assert [job["name"] for job in listed["jobs"]] == ["jobs/1"]


async def test_a_data_url_is_the_image(client: Client, gateway: FakeGateway) -> None:
    assert (await client.post("/v1/jobs", json=controlled({"url": DATA_URL}))).status_code == 201
    (new,) = gateway.jobs.created
    assert sources_of(new) == [("generation.controls[0].image", PNG, "")]


async def test_base64_is_the_image(client: Client, gateway: FakeGateway) -> None:
    body = {"annotation": {"annotator": "canny", "image": {"data": base64.b64encode(PNG).decode()}}}
    assert (await client.post("/v1/jobs", json=body)).status_code == 201
    (new,) = gateway.jobs.created
    assert sources_of(new) == [("annotation.image", PNG, "")]


@pytest.mark.parametrize("as_file", [True, False])
async def test_a_form_brings_the_job_and_its_images(
    client: Client, gateway: FakeGateway, blobs: MemoryBlobs, as_file: bool
) -> None:
    job = json.dumps(controlled({"url": "part:photo"}))
    files: dict[str, Any] = {"photo": ("p.png", PNG), "job": ("job.json" if as_file else None, job)}
    assert (await client.post("/v1/jobs", files=files)).status_code == 201
    (new,) = gateway.jobs.created
    assert sources_of(new) == [("generation.controls[0].image", b"", digest_of(PNG))]
    assert await blobs.stat("default", digest_of(PNG)) is not None


@pytest.mark.parametrize("name", ["p.png", "", None])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
async def test_a_form_made_by_hand_is_read(client: Client, gateway: FakeGateway, name: str | None, mark: bytes) -> None:
    job = mark + json.dumps(controlled({"url": "part:photo"})).encode()
    files: dict[str, Any] = {"note": (None, "to whom it concerns"), "photo": (name, PNG), "job": (None, job)}
    assert (await client.post("/v1/jobs", files=files)).status_code == 201
    (new,) = gateway.jobs.created
    assert sources_of(new) == [("generation.controls[0].image", b"", digest_of(PNG))]


async def test_json_may_begin_with_a_byte_order_mark(client: Client, gateway: FakeGateway) -> None:
    body = codecs.BOM_UTF8 + json.dumps(TEAPOT).encode()
    response = await client.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 201
    assert len(gateway.jobs.created) == 1


async def test_one_part_may_be_the_image_of_several_controls(client: Client, gateway: FakeGateway) -> None:
    control = {"annotator": "canny", "image": {"url": "part:photo"}}
    job = json.dumps({"generation": {"prompt": "a teapot", "controls": [control, control]}})
    response = await client.post("/v1/jobs", files={"photo": ("p.png", PNG), "job": (None, job)})
    assert response.status_code == 201
    (new,) = gateway.jobs.created
    assert [digest for _, _, digest in sources_of(new)] == [digest_of(PNG)] * 2


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"photo": ("p.png", PNG)}, "job"),
        ({"job": (None, "{")}, "job"),
        ({"job": (None, json.dumps(controlled({"url": "part:photo"})))}, "generation.controls[0].image.url"),
        ({"job": (None, json.dumps(TEAPOT)), "photo": ("p.png", PNG)}, "photo"),
        ({"job": (None, json.dumps({"promt": 1}))}, "promt"),
    ],
)
async def test_a_form_that_does_not_fit_together_is_refused(
    client: Client, gateway: FakeGateway, blobs: MemoryBlobs, parts: dict[str, Any], field: str
) -> None:
    response = await client.post("/v1/jobs", files=parts)
    assert error_of(response) == (400, "INVALID_FIELD", field)
    assert not gateway.jobs.created
    assert blobs.used_bytes == 0


async def test_a_part_given_twice_is_refused(client: Client) -> None:
    files = [("photo", ("p.png", PNG)), ("photo", ("q.png", PNG)), ("job", (None, json.dumps(TEAPOT)))]
    assert error_of(await client.post("/v1/jobs", files=files)) == (400, "INVALID_FIELD", "photo")


@pytest.mark.parametrize(
    ("content", "content_type", "field"),
    [
        (b"", "application/json", "body"),
        (b"{", "application/json", "body"),
        (b"[]", "application/json", "body"),
        (b"null", "application/json", "body"),
        (b'{"generation": {"prompt": "\xff"}}', "application/json", "body"),
        (b'{"generation": {"prompt": "\\ud800"}}', "application/json", "generation.prompt"),
        (b"[" * 50_000, "application/json", "body"),
        (json.dumps(TEAPOT).encode(), "text/plain", "Content-Type"),
        (json.dumps(TEAPOT).encode(), "", "Content-Type"),
        (b"prompt=teapot", "application/x-www-form-urlencoded", "Content-Type"),
        (b"--x\r\ngarbage", "multipart/form-data; boundary=x", "job"),
        (b"", "multipart/form-data; boundary=x", "job"),
    ],
)
async def test_a_body_that_is_no_job_is_refused_and_the_next_one_works(
    client: Client, content: bytes, content_type: str, field: str
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = await client.post("/v1/jobs", content=content, headers=headers)
    assert error_of(response) == (400, "INVALID_FIELD", field)
    assert (await client.post("/v1/jobs", json=TEAPOT)).status_code == 201


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, ""),
        ({"generation": {"prompt": "x", "steps": 0}}, 400, "generation.steps"),
        ({"generation": {"prompt": "x", "width_px": 7, "height_px": 8}}, 400, "generation.width_px"),
        ({"generation": {"prompt": "x", "model": "none-such"}}, 404, "generation.model"),
        ({"annotation": {"annotator": "none-such", "image": {"url": DATA_URL}}}, 404, "annotation.annotator"),
        (controlled({"url": "https://example.org/x.png"}), 400, "generation.controls[0].image.url"),
        (controlled({"url": "part:photo"}), 400, "generation.controls[0].image.url"),
        (controlled({"blob": {"digest": "md5:1"}}), 400, "generation.controls[0].image.blob.digest"),
    ],
)
async def test_a_job_that_cannot_be_is_refused_by_field(
    client: Client, body: dict[str, Any], status: int, field: str
) -> None:
    response = await client.post("/v1/jobs", json=body)
    assert response.status_code == status
    if field:
        assert response.json()["error"]["field"] == field


async def test_a_prompt_above_the_body_limit_is_refused_unread(client: Client) -> None:
    response = await client.post("/v1/jobs", json={"generation": {"prompt": "x" * 100_000}})
    assert error_of(response) == (413, "TOO_LARGE", "body")
