"""The stage as the lease loop sees it."""

import numpy as np
import pytest

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.kernel.errors import FanlightError, InvalidField, NotFound
from services.kernel.pictures import PictureLimits
from services.preprocessor.engine import Engine
from services.preprocessor.registry import core
from services.preprocessor.stage import PreprocessStage
from services.worker.ports import Stage
from tests.fakes.synthetic_pictures import decoded, encoded, scene


@pytest.fixture
def stage():
    limits = PictureLimits()
    engine = Engine(threads=1, limits=limits)
    stage: Stage = PreprocessStage(core(), engine, limits=limits)
    yield stage
    engine.close()


def leased(annotator: str = "invert", data: bytes = b"", **fields: object) -> queue_pb2.LeasedTask:
    picture = common_pb2.Picture(data=data or encoded(scene()))
    asked = preprocessor_pb2.AnnotateRequest(annotator=annotator, picture=picture, **fields)
    return queue_pb2.LeasedTask(name="jobs/1/tasks/0", annotate=asked)


async def run(stage: Stage, task: queue_pb2.LeasedTask):
    return await stage.run(task, lambda progress: None)


async def test_a_leased_task_comes_to_one_control_image_without_a_seed(stage):
    outcome = await run(stage, leased(width_px=64, height_px=32))
    (output,) = outcome.outputs
    assert (output.width_px, output.height_px, output.seed) == (64, 32, None)
    assert decoded(output.data).shape == (32, 64, 3)
    assert [name for name, _ in outcome.spans] == ["decode", "annotate", "encode"]


async def test_the_same_task_gives_the_same_bytes(stage):
    first, second = [(await run(stage, leased("shuffle"))).outputs[0].data for _ in range(2)]
    assert first == second
    assert not np.array_equal(decoded(first), scene())


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (leased("openpose"), NotFound),
        (leased(data=b"no picture"), InvalidField),
        (queue_pb2.LeasedTask(generate=diffusion_pb2.GenerateRequest()), InvalidField),
        (queue_pb2.LeasedTask(), InvalidField),
    ],
)
async def test_a_task_that_can_never_succeed_is_the_requests_fault(stage, task, kind):
    with pytest.raises(FanlightError) as raised:
        await run(stage, task)
    assert isinstance(raised.value, kind)
    assert raised.value.is_request_fault


def test_it_tells_the_gateway_its_annotators_and_its_device(stage):
    worker = queue_pb2.Worker()
    stage.describe(worker)
    assert (stage.name, worker.device) == ("preprocess", "cpu")
    assert [annotator.id for annotator in stage.capabilities().annotators] == [annotator.id for annotator in core()]
    assert stage.capabilities() == stage.capabilities()
