"""What the lease loop gets from the stage `diffusion`."""

import asyncio
import io
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.queue.v1 import queue_pb2
from services.diffusion.digests import WeightDigests
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.thread import DeviceThread
from services.diffusion.models.library import Library
from services.diffusion.painter import Painter
from services.diffusion.remote import Fetch, Remote
from services.diffusion.stage import DiffusionStage
from services.diffusion.supply import Supply
from services.kernel.errors import InvalidField
from services.weights.catalog import Catalog
from services.worker.ports import Progress
from tests.fakes.references import FakeStore
from tests.fakes.studio import FakeStudio

ROOM_BYTES = 50 * 10**9


@pytest.fixture
async def stage(catalogue, parser):
    thread, codecs = DeviceThread(), ThreadPoolExecutor(1)
    engine = Engine(FakeStudio, thread=thread, rows_limit=4, hold_limit_s=10.0, clock=time.monotonic)
    running = asyncio.create_task(engine.run())
    digests = WeightDigests()
    painter = Painter(engine, parser, codecs=codecs, digests=digests, clock=time.monotonic)
    store = FakeStore({})
    store.room_bytes = ROOM_BYTES
    supply = Supply(catalogue, store, Remote(catalog=Catalog(), fetch=Fetch.OFF), readers=codecs)
    yield DiffusionStage(painter, engine, catalogue, Library(device="cpu"), digests, supply)
    running.cancel()
    await asyncio.wait([running])
    thread.close()
    codecs.shutdown()


async def test_a_task_becomes_one_picture_with_its_seed_progress_and_spans(stage):
    heard: list[Progress] = []
    task = queue_pb2.LeasedTask(generate=diffusion_pb2.GenerateRequest(steps=2, seed=9, width_px=32, height_px=48))
    outcome = await stage.run(task, heard.append)
    [output] = outcome.outputs
    assert (output.seed, output.width_px, output.height_px) == (9, 32, 48)
    assert Image.open(io.BytesIO(output.data)).size == (32, 48)
    assert heard == [Progress(step=1, steps=2), Progress(step=2, steps=2)]
    assert [name for name, _ in outcome.spans] == ["wait", "load", "prepare", "denoise", "decode", "encode"]


async def test_a_task_of_another_stage_is_refused(stage):
    with pytest.raises(InvalidField):
        await stage.run(queue_pb2.LeasedTask(annotate=preprocessor_pb2.AnnotateRequest()), lambda progress: None)


async def test_the_worker_says_what_it_has_and_how_fast_it_is(stage):
    worker = queue_pb2.Worker()
    stage.describe(worker)
    assert list(worker.disk_models) == ["tiny", "canny", "depth"]
    assert (list(worker.ram_models), worker.step_s, worker.device) == ([], 0, "")
    assert worker.disk_bytes == ROOM_BYTES
    await stage.run(queue_pb2.LeasedTask(generate=diffusion_pb2.GenerateRequest(steps=1)), lambda progress: None)
    stage.describe(worker)
    assert worker.step_s > 0
    assert [model.id for model in stage.capabilities().models] == ["tiny", "canny", "depth"]
