"""What only a GPU can show; skipped where torch finds none."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fanlight.errors import ResourceExhausted
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Start
from services.diffusion.models.model_manager import ModelManager

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


@pytest.fixture(scope="module")
def manager():
    return ModelManager(device="cuda")


@pytest.fixture(scope="module")
def on_gpu(manager):
    return TorchBackend(manager, threads=1)


def finished(backend, *generations):
    rows = [backend.begin(generation) for generation in generations]
    while left := [row for row in rows if not row.is_finished]:
        for advance in backend.advance(left):
            if advance.error:
                raise advance.error
    return [backend.finish(row) for row in rows]


def pixels(backend, *generations):
    return [each.pixels.astype(int) for each in finished(backend, *generations)]


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m", "dpmpp_sde", "lcm", "unipc"])
def test_a_seed_gives_about_the_image_of_the_cpu(scheduler, asked, control, backend, on_gpu):
    """Half precision apart: noise of every step comes from the CPU's generator."""
    generation = asked(scheduler=scheduler, steps=4, controls=(control("canny"),))
    [here], [there] = pixels(backend, generation), pixels(on_gpu, generation)
    assert np.abs(here - there).mean() < 8


def test_strangers_in_the_batch_change_nothing_that_is_seen(asked, on_gpu):
    wanted = [asked(seed=seed, scheduler=kind) for seed, kind in enumerate(["ddim", "euler_a", "heun", "unipc"])]
    alone = [pixels(on_gpu, each)[0] for each in wanted]
    for one, other in zip(alone, pixels(on_gpu, *wanted), strict=True):
        assert np.abs(one - other).mean() < 4


def test_a_strict_image_has_the_same_bits_every_time(asked, control, on_gpu):
    start = Start(image=Image.new("RGB", (64, 64), "red"), strength=0.9, mask=Image.new("L", (64, 64), 255))
    generation = asked(strict=True, controls=(control("canny"),), start=start)
    first, second = (pixels(on_gpu, generation)[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_previews_come_off_the_gpu(asked, on_gpu):
    row = on_gpu.begin(asked(preview_every_steps=1))
    [advance] = on_gpu.advance([row])
    assert Image.open(io.BytesIO(advance.progress.preview.encode())).size == (64, 64)


def test_it_says_what_it_is_and_counts_what_it_holds(asked, manager, on_gpu):
    [made] = finished(on_gpu, asked())
    assert (made.device.split(":")[0], made.dtype) == ("cuda", "float16")
    assert manager.is_on_gpu
    assert 0 < torch.cuda.memory_allocated() <= torch.cuda.mem_get_info()[1]


def test_a_gpu_that_is_full_is_a_typed_error_and_generates_again_once_it_is_not(asked, on_gpu):
    small, large = asked(steps=1), replace(asked(steps=1), width_px=512, height_px=512)
    [before] = pixels(on_gpu, small)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1] + 1e-5)
    try:
        with pytest.raises(ResourceExhausted):
            finished(on_gpu, large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    [after] = pixels(on_gpu, small)
    assert np.array_equal(before, after)
