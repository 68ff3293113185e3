"""A device without room: smaller batches, then a typed error; strangers do not notice, and the next image comes."""

import asyncio
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fanlight.errors import NodeFault, ResourceExhausted
from services.diffusion.engine import backend as backend_module
from services.diffusion.engine import previews as previews_module
from services.diffusion.engine import unet_step
from services.diffusion.engine import vae as vae_module
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.diffusion.engine.memory import vram_estimate_bytes
from services.diffusion.engine.row_batch import FusedSteps, RowBatch
from services.diffusion.engine.vae import ModelGaveNaN
from services.diffusion.models.loading import AutoencoderKL, UNet2DConditionModel
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.recipes import shipped
from services.worker.device import DeviceLost
from tests.fakes.device import FakeGpu
from tests.fakes.memory import FakeMemory
from tests.fakes.step_tables import without_tables

BYTES_LIMIT = 1


class ShortBackend(TorchBackend):
    """Works within a memory of the test's."""

    def __init__(self, memory: FakeMemory, **options) -> None:
        super().__init__(ModelManager(**options), threads=1)
        self.memory = memory
        # How many rows each evaluation had.
        self.batches: list[int] = []

    def load(self, *arguments):
        with self.memory:
            return super().load(*arguments)

    def begin(self, generation):
        with self.memory:
            return super().begin(generation)

    def advance(self, states):
        self.batches.append(len(states))
        with self.memory:
            return super().advance(states)

    def finish(self, state):
        with self.memory:
            return super().finish(state)


def _short(**options):
    return ShortBackend(FakeMemory(**options), open_device=lambda wanted: FakeGpu())


@pytest.fixture
def short():
    return _short()


@pytest.fixture
def mixed(asked, control):
    """Strangers that share their batches."""
    kinds = ["ddim", "euler_a", "dpmpp_2m", "unipc", "heun", "lcm"]
    controls = (control("canny"),)
    return [
        asked(seed=seed, scheduler=kind, steps=4 + seed % 3, controls=controls if seed % 2 else (), prompt=f"a {kind}")
        for seed, kind in enumerate(kinds)
    ]


async def _generated(backend, generations):
    """Pixels or what went wrong, by generation."""
    thread = DeviceThread()
    engine = DiffusionEngine(lambda: backend, thread=thread, rows_limit=8, hold_limit_s=20.0, clock=time.monotonic)
    running = asyncio.create_task(engine.run())
    results = [engine.generate(generation, lambda progress: None) for generation in generations]
    done = await asyncio.gather(*results, return_exceptions=True)
    running.cancel()
    thread.close()
    return [each if isinstance(each, BaseException) else each.pixels.astype(int) for each in done]


def _equal(pixels, others):
    return np.abs(pixels - others).max() <= BYTES_LIMIT


async def test_a_batch_larger_than_the_memory_is_generated_in_parts_that_are_remembered(asked, short):
    wanted = [asked(seed=seed, steps=6) for seed in range(4)]
    alone = [(await _generated(short, [each]))[0] for each in wanted]
    one_bytes = short.memory.most_bytes - short.memory.used_bytes
    short.memory.limit_bytes = short.memory.used_bytes + int(one_bytes * 1.6)
    together = await _generated(short, wanted)
    assert short.memory.shortages > 0
    # Not in every evaluation again.
    assert short.memory.shortages < 6
    assert all(_equal(*pair) for pair in zip(together, alone, strict=True))


async def test_a_memory_too_small_for_one_is_a_typed_error_and_the_next_image_comes(asked, short):
    [before] = await _generated(short, [asked()])
    short.memory.limit_bytes = short.memory.used_bytes
    failed = await _generated(short, [asked(), asked(seed=8)])
    assert all(isinstance(each, ResourceExhausted) and not each.is_request_fault for each in failed)
    short.memory.limit_bytes = 1 << 60
    [after] = await _generated(short, [asked()])
    assert _equal(after, before)


def test_models_that_find_no_room_are_told_by_the_field_that_names_them(asked):
    short = _short(limit_bytes=0)
    with pytest.raises(ResourceExhausted, match="out of memory: it cannot load") as caught:
        short.load(asked().checkpoint, ())
    assert caught.value.field == "model"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 12))])
async def test_shortages_at_random_places_end_in_the_right_image_or_a_typed_error(seed, mixed, short):
    alone = [(await _generated(short, [each]))[0] for each in mixed]
    hit = _short(chance=0.0003, seed=seed)
    for _ in range(2):
        for made, right in zip(await _generated(hit, mixed), alone, strict=True):
            assert isinstance(made, ResourceExhausted) or _equal(made, right)
    assert hit.memory.shortages > 0
    hit.memory.chance = 0.0
    assert all(_equal(*pair) for pair in zip(await _generated(hit, mixed), alone, strict=True))


async def test_nothing_of_a_failed_image_stays_in_memory(asked, short):
    await _generated(short, [asked()])
    before = short.memory.used_bytes
    short.memory.limit_bytes = before + 20_000
    errors = await _generated(short, [asked(seed=seed) for seed in range(3)])
    assert all(isinstance(each, ResourceExhausted) for each in errors)
    # While the errors live on.
    assert short.memory.used_bytes <= before


async def test_a_step_that_found_no_room_half_way_fails_its_image_alone(asked, short, monkeypatch):
    """One of a scheduler without a table."""
    without_tables(monkeypatch)
    step = backend_module.Row.advance

    def advance(row, said):
        if row.generation.seed == 1 and row.index == 2:
            raise torch.OutOfMemoryError
        step(row, said)

    monkeypatch.setattr(backend_module.Row, "advance", advance)
    bad, good = await _generated(short, [asked(seed=1), asked(seed=2)])
    assert isinstance(bad, ResourceExhausted)
    assert not isinstance(good, BaseException)


@pytest.mark.parametrize("times", [1, 1000])
async def test_no_room_to_check_the_numbers_is_tried_again_or_a_typed_error(times, asked, short, monkeypatch):
    check, left = RowBatch.post_flags, [times]

    def post_flags(batch, rows):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError
        return check(batch, rows)

    monkeypatch.setattr(RowBatch, "post_flags", post_flags)
    for made in await _generated(short, [asked(seed=1), asked(seed=2)]):
        assert isinstance(made, ResourceExhausted) if times > 1 else not isinstance(made, BaseException)


async def test_a_step_that_finds_no_room_is_taken_again_with_the_same_noise(asked, short, monkeypatch):
    wanted = asked(scheduler="euler_a", steps=3)
    [expected] = await _generated(short, [wanted])
    left = [1]

    def noise(steps, rows):
        drawn = draw(steps, rows)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError
        return drawn

    draw = FusedSteps._noise
    monkeypatch.setattr(FusedSteps, "_noise", noise)
    [made] = await _generated(short, [wanted])
    assert left == [0]
    assert np.array_equal(made, expected)


async def test_a_preview_that_does_not_fit_is_left_out(asked, short, monkeypatch):
    def no_memory(latents, factor):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(previews_module, "_small", no_memory)
    [made] = await _generated(short, [asked(preview_every_steps=1)])
    assert not isinstance(made, BaseException)


def test_a_preview_that_cannot_be_decoded_is_empty(asked, short, monkeypatch):
    row = short.begin(asked(preview_every_steps=1))
    preview = short.advance([row])[0].progress.preview
    for error in (torch.OutOfMemoryError(), ModelGaveNaN("there is no image in it")):
        monkeypatch.setattr(previews_module, "decode_small", Mock(side_effect=error))
        assert preview.encode() == b""


async def test_who_finds_no_room_beside_a_batch_is_generated_after_it(asked, short, monkeypatch):
    begun = TorchBackend._begin

    # Twice, as it is tried again after a release.
    def begin(self, generation):
        if generation.seed == 2 and self.waits:
            self.waits -= 1
            raise torch.OutOfMemoryError
        return begun(self, generation)

    short.waits = 2
    monkeypatch.setattr(TorchBackend, "_begin", begin)
    made = await _generated(short, [asked(seed=seed, steps=3) for seed in (1, 2, 3)])
    assert not any(isinstance(each, BaseException) for each in made)
    assert short.batches[0] == 1
    assert 2 in short.batches


def test_other_faults_are_not_taken_for_shortages(asked, short, monkeypatch):
    def broken(rows):
        raise RuntimeError("expected scalar type Half but found Float")

    row = short.begin(asked())
    monkeypatch.setattr(unet_step, "_evaluate", broken)
    [step] = short.advance([row])
    assert isinstance(step.error, NodeFault)
    assert not isinstance(step.error, ResourceExhausted)
    assert step.error.part == "checkpoint:tiny"


def test_a_fault_of_the_device_is_told_apart_from_those_of_images(asked, short, monkeypatch):
    def dead(rows):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    row = short.begin(asked())
    monkeypatch.setattr(unet_step, "_evaluate", dead)
    with pytest.raises(DeviceLost) as caught:
        short.advance([row])
    assert caught.value.part.startswith("device:")


@pytest.mark.parametrize("error", ["DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED when"])
def test_what_libraries_say_of_it_counts(error, asked, short, monkeypatch):
    def full(rows):
        raise RuntimeError(error)

    row = short.begin(asked())
    monkeypatch.setattr(unet_step, "_evaluate", full)
    [advance] = short.advance([row])
    assert isinstance(advance.error, ResourceExhausted)


def test_the_vae_works_in_tiles_where_the_whole_does_not_fit(asked, short, monkeypatch):
    row = short.begin(asked(steps=1, width_px=192, height_px=128))
    short.advance([row])
    whole = short.finish(row).pixels.astype(int)
    vae = row.checkpoint.vae
    decode = vae.decode

    def only_tiles(latents, return_dict):
        if not vae.use_tiling:
            raise torch.OutOfMemoryError
        return decode(latents, return_dict=return_dict)

    monkeypatch.setitem(vae.__dict__, "decode", only_tiles)
    tiled = short.finish(row).pixels.astype(int)
    assert np.abs(tiled - whole).mean() < 20
    assert not vae.use_tiling


def test_tiles_are_of_a_size_that_needs_less_for_sdxl_too():
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(shipped("sdxl").vae))
    with vae_module._tiled(vae, True):
        assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 64)
    assert (vae.tile_sample_min_size, vae.use_tiling) == (1024, False)


@pytest.mark.parametrize(("family", "side_px"), [("sd1", 512), ("sd2", 768), ("sdxl", 1024)])
def test_the_estimate_of_what_an_image_needs_is_enough_and_not_much_more(family, side_px, asked, monkeypatch):
    recipe, side = shipped(family), side_px // 8
    generation = asked(width_px=side_px, height_px=side_px)
    shape = replace(
        generation.checkpoint.shape, latent_factor=8, block_out_channels=tuple(recipe.unet["block_out_channels"])
    )
    estimated = vram_estimate_bytes(
        replace(generation, checkpoint=replace(generation.checkpoint, recipe=recipe, shape=shape)), 2
    )
    # As a GPU's kernels have it: the scores of attention are never all there at once.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: query.clone())
    with torch.device("meta"), torch.inference_mode():
        unet = UNet2DConditionModel.from_config(dict(recipe.unet)).half()
        vae = AutoencoderKL.from_config(dict(recipe.vae))
        vae = vae if recipe.vae.get("force_upcast") else vae.half()
        words = torch.empty(2, 77, recipe.unet["cross_attention_dim"]).half()
        added = {"text_embeds": torch.empty(2, 1280).half(), "time_ids": torch.empty(2, 6).half()}
        with (evaluating := FakeMemory()):
            unet(torch.empty(2, 4, side, side).half(), torch.empty(2), words, added_cond_kwargs=added)
        with (decoding := FakeMemory()), vae_module._tiled(vae, side_px > 512):
            vae.decode(torch.empty(1, 4, min(side, 64), min(side, 64), dtype=vae.dtype))
    needed = max(evaluating.most_bytes, decoding.most_bytes)
    assert needed <= estimated <= 3 * needed
