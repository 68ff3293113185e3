"""The diffusion service as a process of its own, called over gRPC on loopback."""

import asyncio
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from fanlight.channel import open_channel
from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from fanlight.errors import FailedPrecondition, InvalidField, NodeFault, NotFound, ResourceExhausted, TooLarge
from services.diffusion.config import WAITING_LIMIT
from services.kernel.errors_wire import from_rpc_error
from tests.fakes.corpus import CORPUS
from tests.fakes.models import make_tiny_model

GenerateRequest, Control = diffusion_pb2.GenerateRequest, diffusion_pb2.Control
LIMIT_S = 120
SLOTS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints: a good one with ControlNets, one with damaged weights, one of pickles."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "good")
    for name in ("damaged", "pickled"):
        for net in make_tiny_model(folder / name).glob("controlnet-*"):
            shutil.rmtree(net)
    [unet] = (folder / "damaged" / "model" / "unet").glob("*.safetensors")
    unet.write_bytes(unet.read_bytes()[:5000])
    [unet] = (folder / "pickled" / "model" / "unet").glob("*.safetensors")
    unet.rename(unet.with_suffix(".bin"))
    return folder


@contextlib.contextmanager
def process(models: Path, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address."""
    settings = {
        "FANLIGHT_DIFFUSION_MODELS": str(models),
        "FANLIGHT_DIFFUSION_DEFAULT_MODEL": "good",
        "FANLIGHT_DIFFUSION_GRPC": "127.0.0.1:0",
        "FANLIGHT_DIFFUSION_THREADS": "1",
        "FANLIGHT_DIFFUSION_SLOTS": str(SLOTS),
        "OMP_NUM_THREADS": "1",
        # So that nothing can be fetched that a request needs, such as a safety checker.
        "FANLIGHT_WEIGHTS_OFFLINE": "true",
        **environment,
    }
    command = [sys.executable, "-m", "services.diffusion"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings})
    try:
        line = started.stdout.readline()
        ready = re.fullmatch(r"ready grpc=(\S+)\n", line)
        assert ready, line
        yield started, ready[1]
    finally:
        started.kill()
        started.wait(LIMIT_S)


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with process(models) as (_, address):
        yield address


@pytest.fixture
async def service(address: str) -> AsyncIterator[diffusion_pb2_grpc.DiffusionServiceStub]:
    async with open_channel(address) as channel:
        yield diffusion_pb2_grpc.DiffusionServiceStub(channel)


def picture() -> common_pb2.ImageSource:
    out = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (80, 50, 3), dtype=np.uint8)).save(out, "PNG")
    return common_pb2.ImageSource(data=out.getvalue())


async def generate(service, request) -> dict[str, list]:
    """The events of one call, by kind."""
    events: dict[str, list] = {}
    async for response in service.Generate(request, timeout=LIMIT_S):
        kind = response.WhichOneof("event")
        events.setdefault(kind, []).append(getattr(response, kind))
    return events


def pixels(events: dict[str, list]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(events["image"][0].data))).astype(int)


async def failure(service, request) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        await generate(service, request)
    return from_rpc_error(caught.value)


async def test_an_image_comes_with_its_steps_previews_seed_and_effective_request(service):
    request = GenerateRequest(prompt="a cat", steps=4, seed=7, preview_every_steps=2)
    events = await generate(service, request)
    assert list(events) == ["queued", "step", "preview", "image", "done"]
    assert [(each.step, each.steps) for each in events["step"]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [each.step for each in events["preview"]] == [2]
    [image], [done] = events["image"], events["done"]
    assert (image.seed, image.width_px, image.height_px) == (7, 64, 64)
    assert Image.open(io.BytesIO(image.data)).size == (64, 64)
    assert {span.name for span in done.spans} == {"wait", "load", "prepare", "denoise", "decode", "encode"}
    assert done.effective.model == "good"
    assert done.effective.steps == 4


async def test_the_effective_request_generates_the_same_image_again(service):
    first = await generate(service, GenerateRequest(prompt="a cat", steps=3, scheduler="euler_a"))
    [done] = first["done"]
    assert done.effective.HasField("seed")
    again = await generate(service, done.effective)
    assert again["image"][0].data == first["image"][0].data


async def test_a_variation_is_in_the_effective_request_and_makes_another_image(service):
    request = GenerateRequest(prompt="a cat", steps=3, seed=7)
    plain = await generate(service, request)
    request.variation_strength = 0.3
    varied = await generate(service, request)
    [done] = varied["done"]
    assert done.effective.HasField("variation_seed")
    again = await generate(service, done.effective)
    assert again["image"][0].data == varied["image"][0].data
    assert np.abs(pixels(varied) - pixels(plain)).max() > 0


async def test_a_strict_image_has_the_same_bits_in_another_process_among_strangers(service, models):
    request = GenerateRequest(prompt="a (cat:1.2)", steps=4, seed=3, scheduler="dpmpp_sde", strict=True)
    first = await generate(service, request)
    with process(models) as (_, address):
        async with open_channel(address) as channel:
            other = diffusion_pb2_grpc.DiffusionServiceStub(channel)
            strangers = [generate(other, GenerateRequest(prompt="a dog", steps=5, seed=seed)) for seed in range(3)]
            again, *_ = await asyncio.gather(generate(other, request), *strangers)
    assert again["image"][0].data == first["image"][0].data


async def test_a_control_image_conditions_the_image(service):
    control = Control(controlnet="canny", image=picture(), scale=1.5)
    plain = await generate(service, GenerateRequest(steps=3, seed=7))
    controlled = await generate(service, GenerateRequest(steps=3, seed=7, controls=[control]))
    assert controlled["done"][0].effective.pipeline == "controlnet"
    assert controlled["image"][0].data != plain["image"][0].data


async def test_models_are_listed_with_where_they_are_held(service):
    await generate(service, GenerateRequest(steps=1))
    models = (await service.ListModels(diffusion_pb2.ListModelsRequest(), timeout=LIMIT_S)).models
    held = {model.id: model.residency for model in models if model.kind == "checkpoint"}
    assert held["good"] == diffusion_pb2.Model.RESIDENCY_RAM
    assert held["damaged"] == diffusion_pb2.Model.RESIDENCY_DISK


async def test_mixed_calls_at_once_give_the_images_they_give_alone(service):
    control = Control(controlnet="depth", image=picture(), end=0.5)
    requests = [
        GenerateRequest(seed=1, steps=4, scheduler="euler_a", prompt="a cat"),
        GenerateRequest(seed=2, steps=6, scheduler="dpmpp_2m_karras", guidance_scale=8),
        GenerateRequest(seed=3, steps=3, controls=[control]),
    ]
    alone = [pixels(await generate(service, request)) for request in requests]
    together = await asyncio.gather(*(generate(service, request) for request in requests))
    for one, other in zip(alone, together, strict=True):
        # Rounded to 8 bits, pixels that hardly differ may still be one apart.
        assert np.abs(one - pixels(other)).max() <= 1


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (GenerateRequest(steps=0), InvalidField, "steps"),
        (GenerateRequest(width_px=7, height_px=7), InvalidField, "width_px"),
        (GenerateRequest(model="nobody"), NotFound, "model"),
        (GenerateRequest(scheduler="nobody"), NotFound, "scheduler"),
        (GenerateRequest(model="damaged"), FailedPrecondition, ""),
        (GenerateRequest(model="pickled"), NotFound, "model"),
        (GenerateRequest(prompt="猫" * 9000), InvalidField, "prompt"),
        (GenerateRequest(prompt="x" * 10_001), TooLarge, "prompt"),
        (GenerateRequest(width_px=2048, height_px=2048), TooLarge, "width_px"),
        (GenerateRequest(clip_skip=12), FailedPrecondition, "clip_skip"),
        (GenerateRequest(precision="bfloat16"), FailedPrecondition, "precision"),
        (GenerateRequest(safety_checker="block"), NodeFault, "safety_checker"),
        (GenerateRequest(count=2), InvalidField, "count"),
        # Field 99, which nothing has defined yet.
        (GenerateRequest.FromString(b"\x98\x06\x01"), InvalidField, "99"),
    ],
)
async def test_a_bad_request_is_a_typed_error_and_the_next_one_works(request_, error, field, service):
    caught = await failure(service, request_)
    assert isinstance(caught, error)
    assert caught.field == field
    assert (await generate(service, GenerateRequest(steps=1)))["image"]


async def test_ending_the_call_frees_the_slot(service):
    for _ in range(SLOTS + WAITING_LIMIT + 1):
        call = service.Generate(GenerateRequest(steps=150), timeout=LIMIT_S)
        async for response in call:
            if response.WhichOneof("event") == "step":
                break
        call.cancel()
    assert (await generate(service, GenerateRequest(steps=1)))["image"]


async def test_more_calls_than_may_wait_are_refused_with_a_delay(service):
    request = GenerateRequest(steps=150)
    calls = [asyncio.create_task(generate(service, request)) for _ in range(SLOTS + WAITING_LIMIT + 3)]
    ended, going_on = await asyncio.wait(calls, timeout=LIMIT_S, return_when=asyncio.FIRST_EXCEPTION)
    for call in going_on:
        call.cancel()
    await asyncio.wait(calls)
    refused = [from_rpc_error(error) for call in ended if (error := call.exception())]
    assert refused
    assert {type(error) for error in refused} == {ResourceExhausted}
    assert all(error.retry_after_s > 0 for error in refused)


async def test_health_and_sigterm(models):
    with process(models, FANLIGHT_DIFFUSION_PRELOAD="false") as (started, address):
        async with open_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="fanlight.diffusion.v1.DiffusionService")
            answer = await health.Check(request, timeout=LIMIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        started.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(started.wait, LIMIT_S) == 0


async def test_a_direct_call_answers_every_bad_request_of_the_corpus_as_client_and_gateway_do(service):
    cases = [case for case in CORPUS if case.expected and isinstance(case.build(), GenerateRequest)]
    answers = {case.name: await failure(service, case.build()) for case in cases}
    assert {name: (error.code, error.field) for name, error in answers.items()} == {
        case.name: case.expected[:2] for case in cases
    }
    assert len(cases) > 40
