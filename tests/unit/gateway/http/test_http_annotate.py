"""/v1/annotate/{annotator}"""

from dataclasses import replace

import httpx
import pytest

from fanlight.contract.names import digest_of
from fanlight.contract.parameters import Parameter
from services.gateway.domain.job import (
    Attempt,
    ControlImage,
    Ending,
    Failure,
    JobState,
    Lease,
    Output,
    Span,
    Task,
    TaskState,
)
from services.gateway.http.annotate import typed
from services.kernel.blobs import BlobInfo
from tests.fakes.fleet import resolved
from tests.fakes.gateway import FakeGateway, a_job
from tests.fakes.memory_blobs import MemoryBlobs

IMAGE = b"\x89PNG\r\n\x1a\n" + b"photo"
MAP = b"\x89PNG\r\n\x1a\n" + b"edges"
Client = httpx.AsyncClient


def succeed(gateway: FakeGateway, blob: BlobInfo) -> None:
    """Let the next job that is waited for have made the blob."""
    queued = a_job("1")
    task = Task(
        number=1,
        stage="preprocess",
        request=0,
        state=TaskState.SUCCEEDED,
        outputs=(Output(blob=blob, width_px=1, height_px=1),),
        queue_time_s=1_000.0,
        lease=Lease(token="t", worker="w", node="n", time_s=1_000.5),
        spans=(Span(name="decode", duration_s=0.002), Span(name="edge, map", duration_s=0.25)),
    )
    gateway.jobs.ending = replace(
        queued,
        state=JobState.SUCCEEDED,
        end_time_s=1_001.0,
        tasks=(task,),
        control_images=(ControlImage(annotator="canny", task=1),),
    )


async def test_an_image_goes_in_and_its_control_image_comes_out(
    client: Client, gateway: FakeGateway, blobs: MemoryBlobs
) -> None:
    info = blobs.put(MAP)
    succeed(gateway, info)
    response = await client.post("/v1/annotate/canny", content=IMAGE)
    assert (response.status_code, response.content) == (200, MAP)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["etag"] == f'"{info.digest}"'
    assert response.headers["fanlight-job"] == "jobs/1"
    (new,) = gateway.jobs.created
    (source,) = new.draft.images
    assert (source.field, source.digest) == ("annotation.image", digest_of(IMAGE))


async def test_the_timings_are_told(client: Client, gateway: FakeGateway, blobs: MemoryBlobs) -> None:
    succeed(gateway, blobs.put(MAP))
    response = await client.post("/v1/annotate/canny", content=IMAGE)
    timing = "queue;dur=500.0, decode;dur=2.0, edge__map;dur=250.0, total;dur=1000.0"
    assert response.headers["server-timing"] == timing


async def test_a_cached_control_image_is_told(client: Client, gateway: FakeGateway, blobs: MemoryBlobs) -> None:
    succeed(gateway, blobs.put(MAP))
    assert gateway.jobs.ending is not None
    cached = ControlImage(annotator="canny", blob=blobs.put(MAP), cached=True)
    gateway.jobs.ending = replace(gateway.jobs.ending, tasks=(), control_images=(cached,))
    response = await client.post("/v1/annotate/canny", content=IMAGE)
    assert response.headers["server-timing"] == 'cache;desc="hit", total;dur=1000.0'


async def test_query_parameters_are_the_annotators_in_its_kinds(
    client: Client, gateway: FakeGateway, blobs: MemoryBlobs
) -> None:
    succeed(gateway, blobs.put(MAP))
    query = {"low_threshold": "50", "gray": "true", "sigma": "1.5", "mode": "fine", "wait": "30"}
    assert (await client.post("/v1/annotate/canny", params=query, content=IMAGE)).status_code == 200
    (new,) = gateway.jobs.created
    assert dict(resolved(new).parameters) == {"low_threshold": 50, "gray": True, "sigma": 1.5, "mode": "fine"}


async def test_a_size_is_asked_for(client: Client, gateway: FakeGateway, blobs: MemoryBlobs) -> None:
    succeed(gateway, blobs.put(MAP))
    await client.post("/v1/annotate/canny?width_px=64&height_px=32", content=IMAGE)
    (new,) = gateway.jobs.created
    assert (resolved(new).width_px, resolved(new).height_px) == (64, 32)


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("/v1/annotate/none-such", 404, "annotation.annotator"),
        ("/v1/annotate/canny?low_threshold=256", 400, "annotation.parameters.low_threshold"),
        ("/v1/annotate/canny?low_threshold=much", 400, "annotation.parameters.low_threshold"),
        ("/v1/annotate/canny?low_threshold=1.5", 400, "annotation.parameters.low_threshold"),
        ("/v1/annotate/canny?low_threshold=inf", 400, "annotation.parameters.low_threshold"),
        ("/v1/annotate/canny?gray=maybe", 400, "annotation.parameters.gray"),
        ("/v1/annotate/canny?mode=none", 400, "annotation.parameters.mode"),
        ("/v1/annotate/canny?threshold=1", 400, "annotation.parameters.threshold"),
        ("/v1/annotate/canny?gray=true&gray=false", 400, "annotation.parameters.gray"),
        ("/v1/annotate/canny?width_px=-1", 400, "width_px"),
        ("/v1/annotate/canny?width_px=64&height_px=64&width_px=32", 400, "width_px"),
        ("/v1/annotate/canny?wait=1&wait=1", 400, "wait"),
        ("/v1/annotate/canny?wait=3600", 400, "wait"),
    ],
)
async def test_what_is_wrong_is_named(client: Client, gateway: FakeGateway, path: str, status: int, field: str) -> None:
    response = await client.post(path, content=IMAGE)
    assert (response.status_code, response.json()["error"]["field"]) == (status, field)
    assert not gateway.jobs.created


async def test_a_job_that_fails_for_the_requests_fault_is_answered_so(client: Client, gateway: FakeGateway) -> None:
    failure = Failure(reason="INVALID_FIELD", message="is not an image", field="image.data")
    gateway.jobs.ending = replace(a_job("1"), state=JobState.FAILED, failure=failure)
    response = await client.post("/v1/annotate/canny", content=IMAGE)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "is not an image"


async def test_a_job_that_no_node_could_do_is_the_servers_fault(client: Client, gateway: FakeGateway) -> None:
    failure = Failure(reason="ATTEMPTS_SPENT", message="three nodes failed")
    gateway.jobs.ending = replace(a_job("1"), state=JobState.FAILED, failure=failure)
    assert (await client.post("/v1/annotate/canny", content=IMAGE)).status_code == 500


async def test_a_wait_that_ends_too_early_reports_the_last_failure(client: Client, gateway: FakeGateway) -> None:
    queued = a_job("1")
    failure = Failure(reason="SOURCE_FAILED", message="pidinet needs a file that cannot be reached")
    attempt = Attempt(worker="w", node="n", lease_time_s=1.0, end_time_s=2.0, ending=Ending.FAILED, failure=failure)
    task = Task(number=1, stage="preprocess", request=0, state=TaskState.QUEUED, attempts=(attempt,))
    gateway.jobs.ending = replace(queued, state=JobState.RUNNING, tasks=(task,))
    response = await client.post("/v1/annotate/canny", content=IMAGE)
    assert response.status_code == 504
    assert "pidinet needs a file that cannot be reached" in response.json()["error"]["message"]


async def test_a_cancelled_job_is_told(client: Client, gateway: FakeGateway) -> None:
    gateway.jobs.ending = replace(a_job("1"), state=JobState.CANCELLED)
    assert (await client.post("/v1/annotate/canny", content=IMAGE)).json()["error"]["reason"] == "CANCELLED"


async def test_a_job_that_takes_longer_than_the_wait_is_named_so_that_it_can_be_found(
    client: Client, gateway: FakeGateway
) -> None:
    response = await client.post("/v1/annotate/canny?wait=0", content=IMAGE)
    assert response.status_code == 504
    assert "/v1/jobs/1" in response.json()["error"]["message"]
    assert not gateway.jobs.unwritten
    assert (await client.get("/v1/jobs/1")).status_code == 200


@pytest.mark.parametrize(
    ("text", "default", "wanted"),
    [
        ("1", 0, 1.0),
        ("-1.5", 0.0, -1.5),
        ("1e3", 0, 1000.0),
        ("x", 0, "x"),
        ("TRUE", False, True),
        ("0", True, False),
        ("2", True, "2"),
        ("1", "text", "1"),
    ],
)
def test_a_text_becomes_the_parameters_kind(text: str, default: bool | float | str, wanted: object) -> None:
    assert typed(text, Parameter(name="p", default=default)) == wanted
