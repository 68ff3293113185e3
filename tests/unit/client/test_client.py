"""The async client against a gateway of real gRPC on loopback."""

import asyncio
from collections import deque

import pytest

from fanlight.client import AsyncClient, Control, annotation, generation
from fanlight.client.blobs import CHUNK_BYTES, digest_of
from fanlight.contract.images import images_of
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import (
    BrokenBlob,
    CallFailed,
    FanlightError,
    InvalidField,
    InvalidInput,
    JobFailed,
    ResourceExhausted,
    Unavailable,
)
from fanlight.gateway.v1.gateway_pb2 import Job
from tests.fakes.corpus import CORPUS, IMAGE
from tests.fakes.job_service import IMAGE_BYTES, FakeJobService, serving


@pytest.fixture
async def service():
    return FakeJobService()


@pytest.fixture
async def client(service):
    async with serving(service) as address, AsyncClient(address) as client:
        client._retry.sleep = no_time
        yield client


async def no_time(delay_s: float) -> None:
    await asyncio.sleep(0)


async def test_a_generation_ends_with_its_images(client):
    job = await client.generate("a cat", count=2, seed=7)

    assert [image.seed for image in job.images] == [7, 8]
    assert await client.read_blob(job.images[0].blob) == IMAGE_BYTES


async def test_what_is_left_open_is_not_sent(client, service):
    await client.create_job(generation("a cat", steps=None, width_px=64, height_px=64))

    sent = service.requests["CreateJob"][0].generation
    assert sent.width_px == 64
    assert not sent.HasField("steps")


async def test_images_travel_as_blobs_and_only_once(client, service, tmp_path):
    image = b"x" * (CHUNK_BYTES * 5 + 1)
    (tmp_path / "in.png").write_bytes(image)
    for _ in range(2):
        await client.generate("a cat", controls=[Control(image=tmp_path / "in.png", annotator="canny", scale=0.5)])

    control = service.requests["CreateJob"][1].generation.controls[0]
    assert control.image.blob.digest == digest_of(image)
    assert (control.annotator, control.scale) == ("canny", 0.5)
    assert not control.image.HasField("data")


async def test_the_image_and_its_mask_travel_as_blobs_too(client, service):
    await client.generate("a cat", image=b"an image", mask=b"a mask")

    sent = service.requests["CreateJob"][0].generation
    assert (sent.image.blob.digest, sent.mask.blob.digest) == (digest_of(b"an image"), digest_of(b"a mask"))


async def test_an_annotation_carries_its_parameters(client, service):
    await client.annotate("canny", b"an image", parameters={"low_threshold": 50, "gray": True})

    sent = service.requests["CreateJob"][0].annotation
    assert dict(sent.parameters) == {"low_threshold": 50, "gray": True}


async def test_a_job_sent_again_is_still_one_job(client, service):
    client._retry.answered = True
    service.failures["CreateJob"] = deque([Unavailable("going"), Unavailable("going")])

    job = await client.create_job(generation("a cat"))

    ids = {request.request_id for request in service.requests["CreateJob"]}
    assert len(service.requests["CreateJob"]) == 3
    assert ids == {job.request_id}
    assert job.request_id


async def test_a_full_queue_is_waited_for_as_long_as_it_says(client, service):
    waited = []

    async def note(delay_s):
        waited.append(delay_s)

    client._retry.sleep = note
    service.failures["CreateJob"] = deque([ResourceExhausted("full", retry_after_s=2.5)])

    await client.create_job(generation("a cat"))

    assert waited == [2.5]


async def test_a_full_queue_is_not_waited_for_past_the_deadline(client, service):
    service.failures["CreateJob"] = deque([ResourceExhausted("full", retry_after_s=3600)])

    with pytest.raises(CallFailed) as caught:
        await client.create_job(generation("a cat"))

    assert (caught.value.code, caught.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 3600)


async def test_a_refusal_names_the_field_and_is_not_sent_again(client, service):
    service.failures["CreateJob"] = deque(
        [InvalidField("is 72; must be a multiple of 64", field="generation.width_px")] * 2
    )

    with pytest.raises(CallFailed) as caught:
        await client.create_job(generation("a cat", width_px=72, height_px=72))

    error = caught.value
    assert (error.code, error.reason, error.field) == ("INVALID_ARGUMENT", "INVALID_FIELD", "generation.width_px")
    assert error.message == "generation.width_px: is 72; must be a multiple of 64"
    assert len(service.requests["CreateJob"]) == 1


BAD = [case for case in CORPUS if case.expected is not None]


@pytest.mark.parametrize("case", BAD, ids=[case.name for case in BAD])
async def test_what_no_worker_can_do_is_refused_before_anything_is_sent(case, service):
    work = case.build()
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(FanlightError) as caught:
            await client.create_job(work)

    code, field, part = case.expected
    prefix = "generation" if isinstance(work, GenerateRequest) else "annotation"
    assert (caught.value.code, caught.value.field) == (code, f"{prefix}.{field}")
    assert part in caught.value.message


async def test_what_some_worker_can_do_is_sent_as_it_is(client, service):
    good = [case for case in CORPUS if case.expected is None]
    for case in good:
        await client.create_job(case.build())

    sent = service.requests["CreateJob"]
    assert len(sent) == len(good)
    for request, case in zip(sent, good, strict=True):
        work = getattr(request, request.WhichOneof("work"))
        for _, image in images_of(work):
            image.CopyFrom(IMAGE)
        assert work == case.build(), case.name


async def test_the_new_options_are_sent(client, service):
    await client.generate("a cat", seed=1, variation_seed=2, variation_strength=0.25, precision="float32", count=2)

    sent = service.requests["CreateJob"][0].generation
    assert (sent.seed, sent.variation_seed, sent.variation_strength) == (1, 2, 0.25)
    assert (sent.precision, sent.count) == ("float32", 2)


async def test_a_watch_goes_on_where_its_stream_broke(client, service):
    job = await client.create_job(generation("a cat"))
    service.breaks.extend([1, 0, 1])

    revisions = [event.job.revision async for event in client.watch_job(job.name) if event.HasField("job")]

    assert revisions == [2, 3]
    assert [request.after_revision for request in service.requests["WatchJob"]] == [0, 2, 2, 2]


async def test_a_watch_of_what_is_known_already_ends(client):
    job = await client.generate("a cat")

    assert [event async for event in client.watch_job(job.name, after_revision=job.revision)] == []
    assert (await client.wait_job(job)).state == Job.STATE_SUCCEEDED


async def test_a_watch_of_no_job_is_refused(client):
    with pytest.raises(CallFailed) as caught:
        await client.wait_job("jobs/none")

    assert caught.value.code == "NOT_FOUND"


async def test_a_failed_job_says_why(client):
    with pytest.raises(JobFailed) as caught:
        await client.generate("fail please")

    assert caught.value.message == "jobs/j1 failed: generation.prompt: is too odd"
    assert (caught.value.job, caught.value.field) == ("jobs/j1", "generation.prompt")


async def test_ending_the_wait_cancels_the_job(client, service):
    seen = asyncio.Event()
    waiting = asyncio.create_task(client.generate("forever", on_event=lambda event: seen.set()))
    await seen.wait()

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert service.jobs["jobs/j1"].state == Job.STATE_CANCELLED


async def test_a_list_takes_as_many_pages_as_it_needs(client):
    for _ in range(7):
        await client.create_job(generation("a cat"))

    assert [job.name for job in await client.list_jobs(limit=5)] == [f"jobs/j{n}" for n in (7, 6, 5, 4, 3)]
    assert len(await client.list_jobs()) == 7


async def test_what_the_workers_offer_is_listed(client):
    assert [annotator.id for annotator in await client.list_annotators()] == ["canny"]
    assert [model.id for model in await client.list_models()] == ["starter"]
    assert [left_out.path for left_out in await client.list_left_out()] == ["Lora/old.ckpt"]
    assert [status.worker.stage for status in await client.list_workers()] == ["preprocess", "diffusion"]


async def test_other_bytes_than_asked_for_are_refused(client, service):
    blob = await client.write_blob(b"right")
    service.blobs._kept["default", blob.digest] = b"wrong"

    with pytest.raises(BrokenBlob):
        await client.read_blob(blob)


async def test_a_blob_is_found_by_its_digest_alone(client):
    blob = await client.write_blob(b"")

    assert await client.read_blob(blob.digest) == b""


async def test_an_unreachable_gateway_is_given_up_on_soon(unused_tcp_port):
    async with AsyncClient(f"127.0.0.1:{unused_tcp_port}", connect_s=0) as client:
        with pytest.raises(CallFailed) as caught:
            await client.list_models()

    assert caught.value.code == "UNAVAILABLE"


async def test_a_missing_token_is_refused_and_the_right_one_taken(service):
    async with serving(service, token="secret") as address:
        async with AsyncClient(address) as client:
            with pytest.raises(CallFailed) as caught:
                await client.list_models()
        async with AsyncClient(address, token="secret") as client:
            assert await client.list_models()

    assert caught.value.code == "UNAUTHENTICATED"


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.png: cannot be read"):
        annotation("canny", tmp_path / "none.png")


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 2**64}, {"steps": "many"}, {"variation_seed": -1}])
def test_what_fits_no_field_is_refused_by_its_name(options):
    with pytest.raises(InvalidInput, match=f"^{next(iter(options))}: "):
        generation("a cat", **options)


def test_a_prompt_that_no_message_takes_is_refused():
    with pytest.raises(InvalidInput, match=r"^prompt: "):
        generation("a \ud800 cat")
