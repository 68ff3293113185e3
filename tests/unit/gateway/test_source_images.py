"""What the gateway learns from the headers of a request's images before a job exists."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from fanlight.common.v1 import common_pb2
from fanlight.contract.parameters import Parameter
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, FanlightError, InvalidField, TooLarge
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Job
from services.gateway.wire import answers, requests
from tests.fakes.fleet import CANNY, PNG, STARTER, STARTER_CANNY, Fleet, FleetWorker
from tests.fakes.heif_boxes import header, ispe

HEIC = Path(__file__).parents[2] / "golden" / "heic"
SMALL, LARGE = 128 * 128, 512 * 512
MODEL = replace(STARTER, pipelines=())
RESIZE_MODE = Parameter(name="resize_mode", default="stretch", choices=("stretch", "crop", "pad"))


def encoded(width_px: int, height_px: int, kind: str = "PNG", *, turn: int = 1) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = turn
    Image.new("RGB", (width_px, height_px)).save(out, kind, exif=exif)
    return out.getvalue()


def source(data: bytes) -> common_pb2.ImageSource:
    return common_pb2.ImageSource(data=data)


async def create(fleet: Fleet, **fields: Any) -> Job:
    asked = diffusion_pb2.GenerateRequest(**{"prompt": "a fox", **fields})
    new = requests.new_job(gateway_pb2.CreateJobRequest(generation=asked), fleet.gateway.workers.offers)
    return await fleet.gateway.jobs.create(new)


async def annotate(fleet: Fleet, **fields: Any) -> Job:
    asked = preprocessor_pb2.AnnotateRequest(annotator="canny", **fields)
    new = requests.new_job(gateway_pb2.CreateJobRequest(annotation=asked), fleet.gateway.workers.offers)
    return await fleet.gateway.jobs.create(new)


async def refusal(made: Any) -> FanlightError:
    with pytest.raises(FanlightError) as caught:
        await made
    return caught.value


async def small_and_large(fleet: Fleet) -> list[FleetWorker]:
    limits = {"small": SMALL, "large": LARGE}
    workers = [
        fleet.worker(DIFFUSION, name, models=(MODEL,), limits=(("pixels", limit),)) for name, limit in limits.items()
    ]
    for each in workers:
        await each.come()
    return workers


async def annotators(fleet: Fleet, pixels: int) -> FleetWorker:
    worker = fleet.worker(PREPROCESS, "edges", annotators=(CANNY,), limits=(("pixels", pixels),))
    await worker.come()
    return worker


async def test_an_image_without_a_size_goes_to_a_worker_that_takes_its_pixels(fleet: Fleet) -> None:
    small, large = await small_and_large(fleet)
    job = await create(fleet, image=source(encoded(303, 204)))
    asked = answers.job(job).generation
    assert (asked.width_px, asked.height_px) == (296, 200)
    assert job.request.facts.amounts == (("pixels", 296 * 200),)
    assert (job.request.facts.width_px, job.request.facts.height_px) == (296, 200)
    assert not await small.lease()
    assert await large.lease()


async def test_an_image_that_a_phone_turned_gives_its_upright_size(fleet: Fleet) -> None:
    await small_and_large(fleet)
    asked = answers.job(await create(fleet, image=source(encoded(256, 128, "JPEG", turn=6)))).generation
    assert (asked.width_px, asked.height_px) == (128, 256)


@pytest.mark.parametrize("data", [encoded(96, 64, "AVIF", turn=6), (HEIC / "turned.heic").read_bytes()])
async def test_an_avif_and_a_heic_give_their_upright_size(fleet: Fleet, data: bytes) -> None:
    await small_and_large(fleet)
    asked = answers.job(await create(fleet, image=source(data))).generation
    assert (asked.width_px, asked.height_px) == (64, 96)


@pytest.mark.parametrize("brand", [b"heic", b"avif"])
async def test_a_hostile_heic_or_avif_is_refused_before_a_job_exists(fleet: Fleet, brand: bytes) -> None:
    await annotators(fleet, 40_000_000)
    for data in (
        header([ispe(0, 2**31)], brands=(brand,)),
        header([ispe(64, 64)], brands=(brand,), items=40_000),
        header([ispe(64, 64)], brands=(brand,))[:-30],
    ):
        refused = await refusal(annotate(fleet, image=source(data)))
        assert refused.field == "annotation.image"
        assert refused.is_request_fault


async def test_a_size_that_is_requested_stays(fleet: Fleet) -> None:
    await small_and_large(fleet)
    job = await create(fleet, image=source(encoded(300, 200)), width_px=64, height_px=72)
    assert (job.request.facts.width_px, job.request.facts.height_px) == (64, 72)


async def test_a_kept_image_gives_its_size_too(fleet: Fleet) -> None:
    await small_and_large(fleet)
    written = fleet.blobs.put(encoded(200, 136) + bytes(200_000))
    blob = common_pb2.Blob(scope=written.scope, digest=written.digest)
    job = await create(fleet, image=common_pb2.ImageSource(blob=blob))
    assert (job.request.facts.width_px, job.request.facts.height_px) == (200, 136)


async def test_an_image_that_is_too_large_for_all_workers_is_refused_at_once(fleet: Fleet) -> None:
    await small_and_large(fleet)
    error = await refusal(create(fleet, image=source(encoded(1024, 512))))
    assert (type(error), error.field) == (FailedPrecondition, "generation.width_px")
    assert error.message == f"needs {1024 * 512} pixels; large takes {LARGE}, small takes {SMALL}"


async def test_control_images_are_made_at_the_size_that_the_image_implies(fleet: Fleet) -> None:
    await fleet.worker(DIFFUSION, models=(MODEL, STARTER_CANNY)).come()
    worker = await annotators(fleet, 1 << 20)
    control = diffusion_pb2.Control(image=source(PNG), annotator="canny", controlnet="canny")
    job = await create(fleet, image=source(encoded(200, 136)), controls=[control])
    (task,) = await worker.lease()
    asked = preprocessor_pb2.AnnotateRequest.FromString(job.request_of(task.task).message)
    assert (asked.width_px, asked.height_px) == (200, 136)
    assert job.request_of(task.task).facts.amounts == (("pixels", 200 * 136),)


@pytest.mark.parametrize("name", ["image", "mask", "control"])
@pytest.mark.parametrize("is_kept", [False, True])
async def test_an_unreadable_header_is_refused_by_its_field(fleet: Fleet, name: str, is_kept: bool) -> None:
    await fleet.worker(DIFFUSION, models=(MODEL, STARTER_CANNY)).come()
    damaged = source(encoded(64, 64)[:20])
    if is_kept:
        written = fleet.blobs.put(damaged.data)
        damaged.blob.CopyFrom(common_pb2.Blob(scope=written.scope, digest=written.digest))
    fields: dict[str, Any] = {"image": {"image": damaged}, "mask": {"image": source(PNG), "mask": damaged}}.get(
        name, {"controls": [diffusion_pb2.Control(image=damaged, controlnet="canny")]}
    )
    error = await refusal(create(fleet, **fields))
    assert (type(error), "header cannot be read" in error.message) == (InvalidField, True)
    assert error.field == f"generation.{'controls[0].image' if name == 'control' else name}"


async def test_a_mask_of_another_size_than_the_image_is_refused(fleet: Fleet) -> None:
    await small_and_large(fleet)
    error = await refusal(create(fleet, image=source(encoded(128, 64)), mask=source(encoded(128, 72))))
    assert (type(error), error.field) == (InvalidField, "generation.mask")
    assert error.message == "is 128 x 72 pixels, the image 128 x 64; they must have one aspect ratio"
    await create(fleet, image=source(encoded(128, 64, "JPEG", turn=8)), mask=source(encoded(64, 128)))


async def test_a_mask_may_be_a_smaller_copy(fleet: Fleet) -> None:
    await small_and_large(fleet)
    await create(fleet, image=source(encoded(128, 66)), mask=source(encoded(64, 33)))


async def test_new_sides_count_into_the_size(fleet: Fleet) -> None:
    workers = await small_and_large(fleet)
    image = source(encoded(120, 128))
    job = await create(fleet, image=image, outpaint_left_px=100, outpaint_top_px=30)
    facts = job.request.facts
    assert (facts.width_px, facts.height_px, facts.amounts) == (224, 160, (("pixels", 224 * 160),))
    assert [len(await each.lease()) for each in workers] == [0, 1]
    error = await refusal(create(fleet, image=image, outpaint_left_px=1000, outpaint_top_px=1000))
    assert (type(error), error.field) == (FailedPrecondition, "generation.width_px")


async def test_the_result_of_only_masked_has_the_size_of_the_image(fleet: Fleet) -> None:
    await small_and_large(fleet)
    image = source(encoded(640, 480))
    job = await create(fleet, image=image, mask=image, only_masked=True, outpaint_right_px=60)
    facts = job.request.facts
    assert (facts.width_px, facts.height_px, facts.result_size_px) == (MODEL.width_px, MODEL.height_px, (700, 480))
    huge = source(encoded(4096, 4097))
    error = await refusal(create(fleet, image=huge, mask=huge, only_masked=True))
    assert (type(error), error.field) == (TooLarge, "generation.image")


@pytest.mark.parametrize(
    ("fields", "size", "fitted"),
    [
        ({}, (64, 64), "crop"),
        ({"resize": "stretch"}, (64, 64), "stretch"),
        ({"resize": "pad", "outpaint_top_px": 100}, (64, 32), "pad"),
        ({"only_masked": True, "mask": source(encoded(200, 100))}, (200, 100), "crop"),
    ],
)
async def test_a_control_image_is_asked_for_as_the_image_is_fitted(
    fleet: Fleet, fields: dict[str, Any], size: tuple[int, int], fitted: str
) -> None:
    await fleet.worker(DIFFUSION, models=(MODEL, STARTER_CANNY)).come()
    worker = fleet.worker(PREPROCESS, annotators=(replace(CANNY, parameters=(*CANNY.parameters, RESIZE_MODE)),))
    await worker.come()
    control = diffusion_pb2.Control(image=source(encoded(300, 100)), annotator="canny", controlnet="canny")
    asked = {"image": source(encoded(200, 100)), "width_px": 64, "height_px": 64, **fields}
    job = await create(fleet, controls=[control], **asked)
    assert await annotated(job, worker) == (size, fitted)


@pytest.mark.parametrize(("resize", "parameter", "fitted"), [("stretch", "", "stretch"), ("stretch", "pad", "pad")])
async def test_a_control_has_a_resize_of_its_own(fleet: Fleet, resize: str, parameter: str, fitted: str) -> None:
    """What the annotator's parameters say goes first."""
    await fleet.worker(DIFFUSION, models=(MODEL, STARTER_CANNY)).come()
    worker = fleet.worker(PREPROCESS, annotators=(replace(CANNY, parameters=(*CANNY.parameters, RESIZE_MODE)),))
    await worker.come()
    control = diffusion_pb2.Control(image=source(PNG), annotator="canny", controlnet="canny", resize=resize)
    if parameter:
        control.parameters["resize_mode"] = parameter
    job = await create(fleet, controls=[control], width_px=64, height_px=64)
    assert (await annotated(job, worker))[1] == fitted


async def annotated(job: Job, worker: FleetWorker) -> tuple[tuple[int, int], str]:
    """The size of the job's control image, and how its photo is fitted."""
    asked = preprocessor_pb2.AnnotateRequest.FromString(job.request_of(job.tasks[0]).message)
    await worker.work()
    return (asked.width_px, asked.height_px), asked.parameters["resize_mode"]


async def test_what_an_older_worker_does_not_know_goes_to_a_newer_one(fleet: Fleet) -> None:
    image = source(encoded(64, 64))
    old = fleet.worker(DIFFUSION, "old", models=(MODEL, STARTER_CANNY), is_old=True)
    await old.come()
    error = await refusal(create(fleet, image=image, mask=image, mask_blur=2.0))
    assert (type(error), error.field) == (FailedPrecondition, "generation.mask_blur")
    edges = diffusion_pb2.Control(image=image, controlnet="canny", mode="prompt")
    error = await refusal(create(fleet, controls=[edges]))
    assert (type(error), error.field) == (FailedPrecondition, "generation.controls[0].mode")
    new = fleet.worker(DIFFUSION, "new", models=(MODEL, STARTER_CANNY))
    await new.come()
    await create(fleet, image=image, mask=image, mask_blur=2.0)
    assert [len(await each.lease()) for each in (old, new)] == [0, 1]
    await create(fleet, image=image, mask=image)
    assert len(await old.lease()) == 1, "nothing in it is newer"


async def test_an_annotation_goes_to_a_worker_that_takes_its_pixels(fleet: Fleet) -> None:
    worker = await annotators(fleet, 512 * 512)
    error = await refusal(annotate(fleet, image=source(PNG), width_px=8192, height_px=8192))
    assert (type(error), error.field) == (FailedPrecondition, "annotation.width_px")
    assert error.message == f"needs {8192 * 8192} pixels; edges takes {512 * 512}"
    job = await annotate(fleet, image=source(PNG), width_px=512, height_px=512)
    assert job.request.facts.amounts == (("pixels", 512 * 512),)
    assert await worker.lease()


async def test_an_annotation_at_the_images_own_size_needs_no_pixels(fleet: Fleet) -> None:
    await annotators(fleet, 16)
    assert (await annotate(fleet, image=source(PNG))).request.facts.amounts == ()


async def test_a_control_image_that_no_annotator_can_make_so_large_is_refused(fleet: Fleet) -> None:
    await fleet.worker(DIFFUSION, models=(MODEL, STARTER_CANNY)).come()
    await annotators(fleet, 128 * 128)
    control = diffusion_pb2.Control(image=source(PNG), annotator="canny", controlnet="canny")
    error = await refusal(create(fleet, controls=[control], width_px=256, height_px=256))
    assert (type(error), error.field) == (FailedPrecondition, "generation.width_px")
    assert "edges takes 16384" in error.message


async def test_a_blob_of_another_scope_is_looked_up_there(fleet: Fleet) -> None:
    await small_and_large(fleet)
    written = fleet.blobs.put(encoded(64, 64), scope="globex")
    blob = common_pb2.Blob(scope="globex", digest=written.digest)
    job = await create(fleet, image=common_pb2.ImageSource(blob=blob))
    assert [each.scope for each in job.blobs] == ["globex"]
    blob.scope = "Globex"
    error = await refusal(create(fleet, image=common_pb2.ImageSource(blob=blob)))
    assert (type(error), error.field) == (InvalidField, "generation.image.blob.scope")


async def create_packed(fleet: Fleet, **fields: Any) -> Job:
    request = gateway_pb2.CreateJobRequest()
    request.request.Pack(diffusion_pb2.GenerateRequest(**{"prompt": "a fox", **fields}))
    return await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({"model": "none"}, "request.model"),
        ({"image": source(PNG[:12])}, "request.image"),
        ({"image": common_pb2.ImageSource(blob=common_pb2.Blob(digest="x"))}, "request.image.blob.digest"),
        ({"image": source(encoded(128, 64)), "mask": source(encoded(64, 64))}, "request.mask"),
        ({"image": source(encoded(1024, 512))}, "request.width_px"),
    ],
)
async def test_errors_about_a_packed_request_name_it_as_the_client_did(
    fleet: Fleet, fields: dict[str, Any], at: str
) -> None:
    await small_and_large(fleet)
    assert (await refusal(create_packed(fleet, **fields))).field == at
    job = await create_packed(fleet, image=source(PNG))
    assert answers.job(job).generation.image.blob.digest == job.blobs[0].digest
