"""Many clients at once with all kinds of jobs: each gets the image that it would have got alone."""

import asyncio
import io
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.diffusion.generator import ImageGenerator
from services.diffusion.images import encode_png
from services.diffusion.provenance import WeightDigests

CLIENTS = 8
# Less than 1e-3 apart before they were rounded, two pixels may be one apart after it.
BYTES_LIMIT = 1


@pytest.fixture
async def generator(backend, parser):
    thread, codecs = DeviceThread(), ThreadPoolExecutor(2)
    engine = DiffusionEngine(lambda: backend, thread=thread, rows_limit=CLIENTS, hold_limit_s=0.2, clock=time.monotonic)
    running = asyncio.create_task(engine.run())
    yield ImageGenerator(engine, parser, codecs=codecs, previews=codecs, digests=WeightDigests(), clock=time.monotonic)
    running.cancel()
    await asyncio.wait([running])
    thread.close()
    codecs.shutdown()


@pytest.mark.parametrize("jobs", [32, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
async def test_mixed_jobs_of_eight_clients_equal_their_solo_results(jobs, generator):
    kinds = _kinds()
    solo = [_pixels(await _generate(generator, request)) for request in kinds]
    drawn = random.Random(1).choices(range(len(kinds)), k=jobs)

    async def client(mine: list[int]) -> None:
        for kind in mine:
            image = _pixels(await _generate(generator, kinds[kind]))
            assert np.abs(image - solo[kind]).max() <= BYTES_LIMIT, kinds[kind]

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(drawn[number::CLIENTS]))


async def test_those_who_leave_on_the_way_disturb_nobody(generator):
    kinds = _kinds()[:4]
    solo = [_pixels(await _generate(generator, request)) for request in kinds]
    leaving = [asyncio.create_task(_generate(generator, request)) for request in kinds]
    staying = [asyncio.create_task(_generate(generator, request)) for request in kinds]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    for alone, task in zip(solo, staying, strict=True):
        assert np.abs(_pixels(await task) - alone).max() <= BYTES_LIMIT


async def _generate(generator: ImageGenerator, request: diffusion_pb2.GenerateRequest):
    return await generator.generate(await generator.parse(request), lambda progress: None)


def _pixels(generated) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(generated.data))).astype(int)


def _kinds() -> list[diffusion_pb2.GenerateRequest]:
    """One of each sort, at two sizes."""
    image, mask = _image(5), _image(6)
    canny = diffusion_pb2.Control(controlnet="canny", image=image, scale=0.8)
    depth = diffusion_pb2.Control(controlnet="depth", image=mask, end=0.6)
    sorts = [
        {"scheduler": "euler_a", "steps": 3},
        {"scheduler": "DPM++ 2M Karras", "steps": 5, "prompt": "a (red:1.3) cat BREAK a dog"},
        {"scheduler": "heun", "steps": 2, "clip_skip": 2},
        {"scheduler": "lcm", "steps": 2, "guidance_scale": 1.0},
        {"image": image, "strength": 0.7},
        {"image": image, "mask": mask, "scheduler": "euler_a"},
        {"controls": [canny]},
        {"controls": [canny, depth], "guess_mode": True},
        {"controls": [depth, canny], "image": image, "strength": 0.8},
        {"controls": [canny], "image": image, "mask": mask},
        {"strict": True},
    ]
    sizes = ((64, 64), (96, 64))
    return [
        diffusion_pb2.GenerateRequest(
            **{
                "prompt": f"picture {number}",
                "negative_prompt": "ugly",
                "steps": 3,
                "seed": number,
                "width_px": width_px,
                "height_px": height_px,
                "preview_every_steps": number % 3,
                **fields,
            }
        )
        for number, fields in enumerate(sorts)
        for width_px, height_px in sizes
    ]


def _image(seed: int) -> common_pb2.ImageSource:
    pixels = np.random.RandomState(seed).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    return common_pb2.ImageSource(data=encode_png(pixels))
