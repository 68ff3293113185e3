"""What a client may request, and the error where it may not."""

import base64
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import json_format, struct_pb2

from fanlight.common.v1 import common_pb2
from fanlight.contract.names import digest_of
from fanlight.errors import FanlightError, InvalidField, NotFound, TooLarge, Unavailable
from fanlight.gateway.v1 import gateway_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.gateway.app.submission import NewJob
from services.gateway.domain import plan
from services.gateway.domain.job import Span
from services.gateway.domain.workers import AnnouncedModel, Capabilities, ReportedStepTime
from services.gateway.wire import answers, requests, workers
from services.gateway.wire.needs import Fleet
from services.gateway.wire.stages import request_for
from tests.fakes.fleet import CANNY, DREAM, OTHER, PNG, STARTER, STARTER_CANNY, FixedFleet, plan_of, resolved

FLEET = FixedFleet((Capabilities(annotators=(CANNY, DREAM)), Capabilities(models=(OTHER, STARTER, STARTER_CANNY))))
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
PHOTO = {"url": DATA_URL}


def parsed(body: dict[str, Any], fleet: Fleet = FLEET) -> NewJob:
    request = gateway_pb2.CreateJobRequest()
    json_format.ParseDict(body, request)
    return requests.new_job(request, fleet)


def work_of(body: dict[str, Any], fleet: Fleet = FLEET) -> Any:
    return resolved(parsed(body, fleet))


def generation(**fields: Any) -> dict[str, Any]:
    return {"generation": {"prompt": "a fox", **fields}}


def controlled(**fields: Any) -> dict[str, Any]:
    return generation(controls=[{"image": PHOTO, "annotator": "canny", **fields}])


def annotation(**fields: Any) -> dict[str, Any]:
    return {"annotation": {"annotator": "canny", "image": PHOTO, **fields}}


def refused(body: dict[str, Any], fleet: Fleet = FLEET) -> FanlightError:
    with pytest.raises(FanlightError) as caught:
        parsed(body, fleet)
    return caught.value


def test_what_is_left_out_is_resolved_from_the_catalog() -> None:
    work = work_of(generation())
    assert (work.model, work.pipeline, work.width_px, work.height_px) == ("starter", "text2img", 256, 256)
    assert not work.HasField("seed")
    assert len(plan_of(parsed(generation())).tasks) == 1
    work = work_of(controlled())
    assert (work.pipeline, work.controls[0].controlnet) == ("controlnet", "canny")
    assert dict(work.controls[0].parameters) == {"low": 100}


def test_an_image_may_be_bytes_a_data_url_or_a_blob() -> None:
    digest = "sha256:" + "a" * 64

    def sent(image: dict[str, Any]) -> Any:
        (source,) = parsed(controlled(image=image)).draft.images
        assert source.field == "generation.controls[0].image"
        return source

    assert sent(PHOTO).data == PNG
    assert sent({"data": base64.b64encode(PNG).decode()}).data == PNG
    assert sent({"url": "data:,%89PNG"}).data == b"\x89PNG"
    blob = sent({"blob": {"digest": digest}})
    assert (blob.scope, blob.digest) == ("default", digest)


INVALID = [
    ({}, "work"),
    (generation(width_px=7, height_px=64), "generation.width_px"),
    (generation(width_px=100, height_px=64), "generation.width_px"),
    (generation(width_px=64, height_px=4096), "generation.height_px"),
    (generation(width_px=64), "generation.height_px"),
    (generation(steps=0), "generation.steps"),
    (generation(steps=151), "generation.steps"),
    (generation(count=0), "generation.count"),
    (generation(count=33), "generation.count"),
    (generation(guidance_scale=30.5), "generation.guidance_scale"),
    (generation(guidance_scale="NaN"), "generation.guidance_scale"),
    (generation(guidance_scale=-1), "generation.guidance_scale"),
    (generation(preview_every_steps=151), "generation.preview_every_steps"),
    (generation(pipeline="controlnet"), "generation.controls"),
    (generation(pipeline="text2img", controls=[{"image": PHOTO, "annotator": "canny"}]), "generation.pipeline"),
    (generation(controls=[{"image": PHOTO, "annotator": "canny"}] * 9), "generation.controls"),
    (controlled(image={}), "generation.controls[0].image"),
    (controlled(image={"data": ""}), "generation.controls[0].image"),
    (controlled(image={"url": "https://example.com/a.png"}), "generation.controls[0].image.url"),
    (controlled(image={"url": "file:///etc/passwd"}), "generation.controls[0].image.url"),
    (controlled(image={"url": "data:image/png;base64,%%%"}), "generation.controls[0].image.url"),
    (controlled(image={"url": "data:image/png"}), "generation.controls[0].image.url"),
    (controlled(image={"blob": {"digest": "md5:1"}}), "generation.controls[0].image.blob.digest"),
    (controlled(parameters={"low": 256}), "generation.controls[0].parameters.low"),
    (controlled(parameters={"low": 1.5}), "generation.controls[0].parameters.low"),
    (controlled(parameters={"low": None}), "generation.controls[0].parameters.low"),
    (controlled(parameters={"low": [1]}), "generation.controls[0].parameters.low"),
    (controlled(parameters={"high": 1}), "generation.controls[0].parameters.high"),
    (controlled(annotator="", controlnet="canny", parameters={"low": 1}), "generation.controls[0].parameters"),
    (controlled(annotator=""), "generation.controls[0].controlnet"),
    (controlled(scale=2.1), "generation.controls[0].scale"),
    (controlled(start=0.5, end=0.5), "generation.controls[0].end"),
    (controlled(start=1.0), "generation.controls[0].start"),
    (controlled(end=1.5), "generation.controls[0].end"),
    ({"annotation": {"annotator": "canny"}}, "annotation.image"),
    ({"annotation": {"image": PHOTO}}, "annotation.annotator"),
    (annotation(width_px=64), "annotation.height_px"),
    (annotation(width_px=64, height_px=9999), "annotation.height_px"),
    (generation() | {"priority": 101}, "priority"),
    (generation() | {"request_id": "r" * 129}, "request_id"),
]


@pytest.mark.parametrize(("body", "field"), INVALID, ids=[f"{i}-{field}" for i, (_, field) in enumerate(INVALID)])
def test_a_wrong_field_is_named(body: dict[str, Any], field: str) -> None:
    error = refused(body)
    assert isinstance(error, InvalidField)
    assert error.field == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (generation(model="none"), "generation.model"),
        (generation(scheduler="none"), "generation.scheduler"),
        (generation(image=PHOTO), "generation.pipeline"),
        (controlled(annotator="none"), "generation.controls[0].annotator"),
        (controlled(controlnet="depth"), "generation.controls[0].controlnet"),
        ({"annotation": {"annotator": "none", "image": PHOTO}}, "annotation.annotator"),
    ],
)
def test_what_no_worker_offers_is_not_found_and_what_exists_is_listed(body: dict[str, Any], field: str) -> None:
    error = refused(body)
    assert isinstance(error, NotFound)
    assert error.field == field
    assert any(each in error.message for each in ("starter", "ddim", "canny", "text2img"))


@pytest.mark.parametrize(
    ("name", "resolved_to"),
    [("HeunDiscreteScheduler", "HeunDiscreteScheduler"), ("Heun", "heun"), ("k_heun", "heun"), ("HEUN", "heun")],
)
def test_a_scheduler_may_be_named_by_its_class(name: str, resolved_to: str) -> None:
    offers = ("scheduler:HeunDiscreteScheduler", "scheduler:heun")
    fleet = FixedFleet((Capabilities(models=(STARTER,), other_offers=offers),))
    assert work_of(generation(scheduler=name), fleet).scheduler == resolved_to


def test_a_controlnet_of_another_family_does_not_fit() -> None:
    error = refused(generation(model="other", controls=[{"image": PHOTO, "annotator": "canny"}]))
    assert isinstance(error, InvalidField)
    assert error.field == "generation.controls[0].controlnet"


def test_a_prompt_has_a_limit_in_characters() -> None:
    assert parsed(generation(prompt="a" * 10_000))
    assert parsed(generation(prompt="ä" * 5_001))
    error = refused(generation(prompt="a" * 10_001))
    assert isinstance(error, TooLarge)
    assert error.field == "generation.prompt"


@pytest.mark.parametrize("stages", [[], ["preprocess"]])
def test_without_any_worker_of_a_stage_a_client_is_asked_to_come_later(stages: list[str]) -> None:
    error = refused(generation(), FixedFleet((), stages))
    assert isinstance(error, Unavailable)
    assert error.retry_after_s


def test_only_the_same_content_has_the_same_digest() -> None:
    digests = [parsed(body).content_digest for body in (controlled(), controlled(), controlled(scale=1.0))]
    assert digests[0] == digests[1] != digests[2]


def test_a_model_that_does_not_say_what_it_can_is_taken_at_its_word() -> None:
    fleet = FixedFleet((Capabilities(models=(AnnouncedModel(id="m", kind="checkpoint"),)),))
    work = work_of(generation(image=PHOTO, width_px=72, height_px=80, clip_skip=12), fleet)
    assert (work.model, work.pipeline) == ("m", "img2img")


@pytest.mark.parametrize(("asked", "size"), [({}, (64, 64)), ({"width_px": 72, "height_px": 80}, (72, 80))])
def test_control_images_are_made_at_the_size_of_the_image_to_generate(
    asked: dict[str, int], size: tuple[int, int]
) -> None:
    model = replace(STARTER, width_px=64, height_px=64)
    fleet = FixedFleet((Capabilities(annotators=(CANNY,), models=(model, STARTER_CANNY)),))
    new = parsed({"generation": {**controlled()["generation"], **asked}}, fleet)
    assert (resolved(new).width_px, resolved(new).height_px) == size
    annotated = preprocessor_pb2.AnnotateRequest.FromString(plan_of(new).requests[1].message)
    assert (annotated.width_px, annotated.height_px) == size


def test_annotators_and_models_survive_the_wire_and_back() -> None:
    message = queue_pb2.Capabilities(
        annotators=[answers.annotator(each) for each in (CANNY, DREAM)], models=[answers.model(STARTER)]
    )
    assert workers.capabilities(message) == Capabilities(annotators=(CANNY, DREAM), models=(STARTER,))


def test_another_services_name_for_an_annotator_means_the_annotator() -> None:
    named = replace(CANNY, aliases=("canny_edge",))
    fleet = FixedFleet((Capabilities(annotators=(named,)), Capabilities(models=(STARTER, STARTER_CANNY))))
    assert work_of(annotation(annotator="canny_edge"), fleet).annotator == "canny"
    assert work_of(controlled(annotator="canny_edge"), fleet).controls[0].annotator == "canny"
    assert workers.capabilities(queue_pb2.Capabilities(annotators=[answers.annotator(named)])).annotators == (named,)


@pytest.mark.parametrize("name", ["CANNY", " canny ", "Canny", "Canny_Edge\t"])
def test_an_annotators_name_may_be_in_any_case_with_spaces_around_it(name: str) -> None:
    named = replace(CANNY, aliases=("canny_edge",))
    fleet = FixedFleet((Capabilities(annotators=(named,)), Capabilities(models=(STARTER, STARTER_CANNY))))
    assert work_of(annotation(annotator=name), fleet).annotator == "canny"
    assert work_of(controlled(annotator=name), fleet).controls[0].annotator == "canny"


def test_a_worker_that_describes_nonsense_is_refused_by_the_field() -> None:
    parameter = preprocessor_pb2.Parameter(
        name="low", kind=preprocessor_pb2.Parameter.KIND_INTEGER, default_value=struct_pb2.Value(string_value="x")
    )
    message = queue_pb2.Capabilities(annotators=[preprocessor_pb2.Annotator(id="a", parameters=[parameter])])
    with pytest.raises(InvalidField) as caught:
        workers.capabilities(message)
    assert caught.value.field == "capabilities.annotators[0].parameters[0].default_value"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": "a b"}, "worker.id"),
        ({"id": ""}, "worker.id"),
        ({"node": ""}, "worker.node"),
        ({"node": "a\nb"}, "worker.node"),
        ({"node": "a\x00"}, "worker.node"),
        ({"node": "a\u202eb"}, "worker.node"),
        ({"version": "1\x1b[0m"}, "worker.version"),
        ({"device": "cpu\r"}, "worker.device"),
        ({"stage": "Paint!"}, "worker.stage"),
    ],
)
def test_a_worker_without_a_proper_name_is_refused(changes: dict[str, str], field: str) -> None:
    worker = queue_pb2.Worker(**{"id": "w", "node": "n", "stage": "diffusion", **changes})
    with pytest.raises(InvalidField) as caught:
        workers.poll(queue_pb2.LeaseTasksRequest(worker=worker))
    assert caught.value.field == field


def test_absurd_measurements_count_as_unknown() -> None:
    times = [
        queue_pb2.StepTime(family="sd1", size_class=18, mean_s=mean_s) for mean_s in (float("nan"), float("inf"), -1, 2)
    ]
    worker = queue_pb2.Worker(id="w", node="n", stage="s", goodput_bps=float("inf"), step_times=times)
    polled = workers.poll(queue_pb2.LeaseTasksRequest(worker=worker)).worker
    assert polled.goodput_bps == 0.0
    assert polled.step_times == (ReportedStepTime(family="sd1", size_class=18, mean_s=2.0),)


def test_a_span_without_a_finite_duration_is_left_out() -> None:
    spans = [common_pb2.Span(name="denoise", duration_s=each) for each in (1.5, float("inf"), float("nan"))]
    assert workers.spans(queue_pb2.CompleteTaskRequest(spans=spans)) == [Span(name="denoise", duration_s=1.5)]


def test_parameters_go_to_a_worker_as_they_were_given() -> None:
    new = parsed(annotation(parameters={"low": 7}))
    job = plan.create(plan_of(new), job_id="1", request_id="", priority=0, now_s=1.0)
    request = preprocessor_pb2.AnnotateRequest()
    assert request_for(job, job.tasks[0]).Unpack(request)
    assert (request.annotator, dict(request.parameters)) == ("canny", {"low": 7})
    assert request.image.blob.digest == digest_of(PNG)


def test_what_a_worker_fetches_is_shown_to_watchers_of_the_job() -> None:
    coming = common_pb2.FetchProgress(
        reference="sd15", done_bytes=40, total_bytes=100, goodput_bps=80.0, seconds_left=6.0, source="hub.example"
    )
    request = queue_pb2.RenewLeasesRequest(
        worker_id="w", renewals=[queue_pb2.Renewal(lease_token=b"jobs/a/1/x", progress={"fetch": coming})]
    )
    (renewal,) = workers.renewals(request)
    assert renewal.progress is not None
    assert answers.event(renewal.progress).progress.fetch == coming


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf")])
def test_an_impossible_speed_is_unknown(nonsense: float) -> None:
    coming = common_pb2.FetchProgress(reference="sd15", goodput_bps=nonsense, seconds_left=nonsense)
    request = queue_pb2.RenewLeasesRequest(
        worker_id="w", renewals=[queue_pb2.Renewal(lease_token=b"jobs/a/1/x", progress={"fetch": coming})]
    )
    (renewal,) = workers.renewals(request)
    assert renewal.progress is not None
    said = answers.event(renewal.progress).progress.fetch
    assert said.goodput_bps == 0
    assert not said.HasField("seconds_left")


def test_a_preview_above_its_limit_is_dropped_and_the_renewal_stands() -> None:
    progress = queue_pb2.Progress(step=1, steps=2, preview=bytes(70_000))
    request = queue_pb2.RenewLeasesRequest(renewals=[queue_pb2.Renewal(lease_token=b"t", progress=progress)])
    (renewal,) = workers.renewals(request)
    assert renewal.progress is not None
    assert (renewal.progress.step, renewal.progress.preview) == (1, b"")


def test_a_failure_must_say_whose_fault_it_is() -> None:
    with pytest.raises(InvalidField):
        workers.fault(queue_pb2.FailTaskRequest(failure=common_pb2.Failure(reason="X")))


def test_requests_that_mean_the_same_have_the_same_content() -> None:
    """A client that sends again may know more, or less, of a blob than before."""
    digest = digest_of(b"photo")
    digests = []
    for blob in (
        common_pb2.Blob(digest=digest),
        common_pb2.Blob(scope="default", digest=digest, size_bytes=5, media_type="image/png"),
        common_pb2.Blob(scope="other", digest=digest),
    ):
        request = gateway_pb2.CreateJobRequest(request_id="r")
        request.annotation.annotator = "canny"
        request.annotation.image.blob.CopyFrom(blob)
        digests.append(requests.new_job(request, FLEET).content_digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "name",
    ["canny", "lllyasviel/control_v11p_sd15_canny", "control_v11p_sd15_canny", "Control_v11p_sd15_Canny [d14c016b]"],
)
def test_a_model_goes_by_its_other_names_too(name: str) -> None:
    aliases = ("lllyasviel/control_v11p_sd15_canny", "control_v11p_sd15_canny")
    models = (STARTER, replace(STARTER_CANNY, aliases=aliases))
    fleet = FixedFleet((Capabilities(annotators=(CANNY,)), Capabilities(models=models)))
    (control,) = work_of(controlled(controlnet=name), fleet).controls
    assert control.controlnet == "canny"
    with pytest.raises(NotFound):
        parsed(controlled(controlnet="control_v11p_sd15"), fleet)
