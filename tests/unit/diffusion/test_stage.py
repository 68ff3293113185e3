"""What the lease loop gets from the stage `diffusion`."""

import asyncio
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from fanlight.contract.schedulers import SHORT_NAMES
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import InvalidField
from fanlight.queue.v1 import queue_pb2
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.diffusion.generator import ImageGenerator
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.tiers import Residency
from services.diffusion.provenance import WeightDigests
from services.diffusion.stage import DiffusionStage
from services.diffusion.supply import FetchMode, RemoteModels, Supply
from services.weights.references.catalog import Catalog
from services.worker.device import DeviceLost
from services.worker.ports import ReportsCondition, StageCondition, StageProgress
from tests.fakes.backend import FakeBackend
from tests.fakes.references import FakeStore

ROOM_BYTES = 50 * 10**9


@pytest.fixture
async def stage(catalog, parser):
    thread, codecs = DeviceThread(), ThreadPoolExecutor(1)
    engine = DiffusionEngine(
        FakeBackend,
        thread=thread,
        rows_limit=4,
        hold_limit_s=10.0,
        clock=time.monotonic,
        family_of=catalog.family_of,
    )
    running = asyncio.create_task(engine.run())
    digests = WeightDigests()
    generator = ImageGenerator(engine, parser, codecs=codecs, previews=codecs, digests=digests, clock=time.monotonic)
    store = FakeStore({})
    store.room_bytes = ROOM_BYTES
    supply = Supply(catalog, store, RemoteModels(catalog=Catalog(), fetch=FetchMode.OFF), readers=codecs)
    yield DiffusionStage(generator, engine, catalog, ModelManager(device="cpu"), digests, supply, parser.abilities)
    running.cancel()
    await asyncio.wait([running])
    thread.close()
    codecs.shutdown()


async def run(stage, request: GenerateRequest, report=lambda progress: None):
    return await stage.run(request, queue_pb2.LeasedTask(), report)


async def test_a_task_becomes_one_image_with_its_seed_progress_and_spans(stage):
    heard: list[StageProgress] = []
    outcome = await run(stage, GenerateRequest(steps=2, seed=9, width_px=64, height_px=96), heard.append)
    [output] = outcome.outputs
    assert (output.seed, output.width_px, output.height_px) == (9, 64, 96)
    assert Image.open(io.BytesIO(output.data)).size == (64, 96)
    assert heard == [StageProgress(step=1, steps=2), StageProgress(step=2, steps=2)]
    assert [name for name, _ in outcome.spans] == ["wait", "load", "prepare", "denoise", "decode", "encode"]


async def test_what_shows_on_the_device_only_is_warned_of_and_in_the_provenance(stage):
    await stage._engine.open()
    stage._engine._opened.warnings = ("two layers of the LoRA do not fit",)
    outcome = await run(stage, GenerateRequest(steps=1))
    [output] = outcome.outputs
    assert output.warnings == ["two layers of the LoRA do not fit"]
    assert json.loads(output.provenance)["warnings"] == output.warnings


async def test_what_the_contract_refuses_is_refused_before_anything_is_fetched(stage, monkeypatch):
    def fetch(*arguments):
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr(stage._supply, "provided", fetch)
    with pytest.raises(InvalidField) as caught:
        await run(stage, GenerateRequest(steps=151))
    assert caught.value.field == "steps"


async def test_the_worker_says_what_it_has_and_how_fast_it_is(stage):
    worker = queue_pb2.Worker()
    stage.describe(worker)
    assert list(worker.disk_models) == ["tiny", "canny", "depth"]
    assert (list(worker.ram_models), list(worker.step_times), worker.device) == ([], [], "")
    assert worker.disk_bytes == ROOM_BYTES
    await run(stage, GenerateRequest(steps=1))
    worker = queue_pb2.Worker()
    stage.describe(worker)
    [time_] = worker.step_times
    assert (time_.family, time_.size_class, time_.mean_s > 0) == ("tiny", 12, True)


async def test_capabilities_are_all_that_a_worker_can_do(stage):
    capabilities = stage.capabilities()
    assert [model.id for model in capabilities.models] == ["tiny", "canny", "depth"]
    assert {model.family for model in capabilities.models} == {"tiny"}
    [checkpoint, *_] = capabilities.models
    assert checkpoint.text_encoder_layers == 2
    assert list(checkpoint.schedulers) == list(SHORT_NAMES)
    assert {"scheduler:euler_a", "precision:float32"} <= set(capabilities.offers)
    assert not [offer for offer in capabilities.offers if offer.startswith("safety_checker:")]
    assert [(limit.name, limit.maximum) for limit in capabilities.limits] == [("pixels", 256 * 256)]


async def test_capabilities_do_not_change_with_what_is_loaded(stage, catalog):
    before = stage.capabilities()
    assert stage.capabilities() is before
    stage._models.checkpoint(catalog.default())
    stage._digests.of(catalog.default())
    stage._digests.of(catalog.controlnets[0])
    catalog.revision += 1
    assert stage._models.residency(catalog.default()) is Residency.RAM
    assert stage.capabilities() == before


def test_its_condition_is_that_of_the_preload_and_the_device(stage):
    assert isinstance(stage, ReportsCondition)
    assert stage.condition() is StageCondition.WARM
    stage.is_loading = True
    assert stage.condition() is StageCondition.LOADING
    stage._engine._lost = DeviceLost("gone")
    assert stage.condition() is StageCondition.LOST
