"""The stage as the lease loop uses it."""

import numpy as np
import pytest
from google.protobuf import struct_pb2

from fanlight.common.v1 import common_pb2
from fanlight.errors import FanlightError, InvalidField, NodeFault, NotFound, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.kernel.images import ImageLimits
from services.preprocessor.annotators.faces import MEDIAPIPE_FACE
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import Registry, core
from services.preprocessor.service import PreprocessStage
from services.preprocessor.weights import StoreWeights
from services.weights.settings import WeightsSettings
from services.worker.ports import Outcome, Stage
from tests.fakes.synthetic_images import decoded, encoded, scene
from tests.fakes.worker import task_of

LIMITS = ImageLimits(pixels=1_000_000, size_bytes=200_000)
ANNOTATORS = Registry([*core(), MEDIAPIPE_FACE])


@pytest.fixture
async def stage(tmp_path):
    """Without any weights."""
    async with StoreWeights(WeightsSettings(dir=tmp_path, offline=True)) as weights:
        engine = AnnotationEngine(threads=1, limits=LIMITS, weights=weights)
        stage: Stage[preprocessor_pb2.AnnotateRequest] = PreprocessStage(ANNOTATORS, engine, limits=LIMITS)
        yield stage
        engine.close()


def parameters(**values: object) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def request(annotator: str = "invert", data: bytes = b"", **fields: object) -> preprocessor_pb2.AnnotateRequest:
    image = common_pb2.ImageSource(data=data or encoded(scene()))
    return preprocessor_pb2.AnnotateRequest(annotator=annotator, image=image, **fields)


async def run(stage: PreprocessStage, asked: preprocessor_pb2.AnnotateRequest) -> Outcome:
    return await stage.run(asked, task_of(asked), lambda progress: None)


async def test_a_leased_task_gives_one_control_image_without_a_seed(stage):
    outcome = await run(stage, request(width_px=64, height_px=32))
    (output,) = outcome.outputs
    assert (output.width_px, output.height_px, output.seed) == (64, 32, None)
    assert decoded(output.data).shape == (32, 64, 3)
    assert [name for name, _ in outcome.spans] == ["decode", "annotate", "encode"]


async def test_the_same_task_gives_the_same_bytes(stage):
    first, second = [(await run(stage, request("shuffle"))).outputs[0].data for _ in range(2)]
    assert first == second
    assert not np.array_equal(decoded(first), scene())


@pytest.mark.parametrize(
    ("asked", "kind", "field"),
    [
        (request("openpose"), NotFound, "annotator"),
        (request("mediapipe_face"), NodeFault, "annotator"),
        (request(data=encoded(scene(1_200, 900), "JPEG", quality=1)), TooLarge, "image"),
        (request(data=bytes(LIMITS.size_bytes + 1)), TooLarge, "image"),
        (request(width_px=1_024, height_px=1_024), TooLarge, "width_px"),
    ],
)
async def test_what_this_worker_lacks_or_does_not_allow_is_not_the_requests_fault(stage, asked, kind, field):
    with pytest.raises(FanlightError) as raised:
        await run(stage, asked)
    assert isinstance(raised.value, kind)
    assert (raised.value.is_request_fault, raised.value.field) == (False, field)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (request(data=b"no image"), "image"),
        (preprocessor_pb2.AnnotateRequest(annotator="invert"), "image"),
        (request(width_px=64), "height_px"),
        (request(width_px=20_000, height_px=64), "width_px"),
        (request(parameters=parameters(low_threshold=1)), "parameters.low_threshold"),
    ],
)
async def test_a_request_that_can_never_succeed_is_the_requests_fault(stage, asked, field):
    with pytest.raises(InvalidField) as raised:
        await run(stage, asked)
    assert (raised.value.is_request_fault, raised.value.field) == (True, field)


def test_it_announces_its_annotators_and_its_largest_image(stage):
    capabilities = stage.capabilities()
    assert [annotator.id for annotator in capabilities.annotators] == [annotator.id for annotator in ANNOTATORS]
    assert [(limit.name, limit.maximum) for limit in capabilities.limits] == [("pixels", 1_000_000)]


def test_loaded_networks_are_not_part_of_the_capabilities(stage, monkeypatch):
    before = stage.capabilities()
    worker = queue_pb2.Worker()
    stage.describe(worker)
    assert not any(annotator.loaded for annotator in before.annotators)
    assert (worker.device, list(worker.ram_models)) == ("cpu", [f"annotator:{each.id}" for each in core()])
    monkeypatch.setattr(AnnotationEngine, "is_loaded", lambda engine, annotator: annotator is MEDIAPIPE_FACE)
    assert stage.capabilities() is before
    stage.describe(worker)
    assert list(worker.ram_models) == ["annotator:mediapipe_face"]
