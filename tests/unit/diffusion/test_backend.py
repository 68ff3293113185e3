"""What the device thread does for one image: previews, sound numbers, all schedulers."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from PIL import Image

from fanlight.contract.schedulers import CLASSES
from fanlight.errors import InvalidField, ResourceExhausted
from services.diffusion.engine import sampler as sampler_module
from services.diffusion.engine import unet_step
from services.diffusion.engine import vae as vae_module
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Start
from services.diffusion.engine.previews import PREVIEW_SIDE_PX, LatentPreview
from services.diffusion.engine.row import are_finite
from services.diffusion.engine.vae import ModelGaveNaN
from services.diffusion.models.device import CpuDevice
from services.diffusion.models.entries import VaeEntry
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.scan import scan
from tests.fakes.models import make_tiny_model


@pytest.mark.parametrize("scheduler", ["dpmpp_sde", *CLASSES])
def test_every_scheduler_on_offer_generates(scheduler, asked, generated):
    [row] = generated(asked(scheduler=scheduler, steps=4))
    assert are_finite([row]) == [True]
    assert row.index == row.evaluations >= 4


def test_a_scheduler_that_cannot_run_so_few_steps_says_so(asked, backend):
    with pytest.raises(InvalidField) as caught:
        backend.begin(asked(scheduler="PNDMScheduler", steps=1))
    assert caught.value.field == "steps"


def test_a_scheduler_for_checkpoints_of_another_kind_says_so(asked, backend, monkeypatch):
    def lacking(*arguments, **named):
        raise TypeError("unsupported operand type(s) for **")

    monkeypatch.setattr(sampler_module, "make_scheduler", lacking)
    with pytest.raises(InvalidField, match="another kind") as caught:
        backend.begin(asked(scheduler="edm_euler"))
    assert caught.value.field == "scheduler"


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "unipc"])
def test_previews_come_every_so_many_steps_and_are_small(scheduler, asked, backend):
    row = backend.begin(asked(scheduler=scheduler, preview_every_steps=2, width_px=256, height_px=128))
    previews = [backend.advance([row])[0].progress.preview for _ in range(row.evaluations)]
    assert [bool(preview) for preview in previews] == [False, True, False, True, False]
    png = previews[1].encode()
    assert Image.open(io.BytesIO(png)).size == (PREVIEW_SIDE_PX, PREVIEW_SIDE_PX // 2)
    assert len(png) <= 64 * 1024


@pytest.mark.parametrize("part", ["model/text_encoder", "controlnet-canny"])
def test_after_a_file_was_replaced_nothing_that_was_made_of_the_old_one_is_used(part, tmp_path, asked, control):
    folder, other = (make_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "other")))
    catalog = scan([folder])
    net = catalog.controlnet("canny", catalog.default())
    wanted = replace(
        asked(), checkpoint=catalog.default(), controls=(replace(control("canny"), controlnet=net, scale=2.0),)
    )

    def one_step(backend):
        row = backend.begin(wanted)
        backend.advance([row])
        return row.latents

    kept = TorchBackend(ModelManager(device="cpu"), threads=1)
    before = one_step(kept)
    [weights] = (other / part).glob("*.safetensors")
    weights.rename(folder / part / weights.name)
    after, fresh = one_step(kept), one_step(TorchBackend(ModelManager(device="cpu"), threads=1))
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("size_px", [(1024, 16), (16, 1024)])
def test_a_preview_of_an_image_that_is_a_mere_line_has_at_least_one_row(size_px, asked, backend):
    row = backend.begin(asked(preview_every_steps=1, steps=2, width_px=size_px[0], height_px=size_px[1]))
    [advance] = backend.advance([row])
    assert max(Image.open(io.BytesIO(advance.progress.preview.encode())).size) == PREVIEW_SIDE_PX


def test_nan_is_reported_for_the_image_that_has_it(asked, backend):
    bad, good = (backend.begin(asked(seed=seed)) for seed in (1, 2))
    bad.latents = torch.full_like(bad.latents, float("nan"))
    advances = backend.advance([bad, good])
    assert isinstance(advances[0].error, ModelGaveNaN)
    assert advances[1].error is None


def test_nan_from_the_vae_is_no_black_image(asked, backend, generated, monkeypatch):
    [row] = generated(asked(steps=1))
    broken = replace(row.checkpoint, vae=_NaNVae(row.checkpoint.vae.config))
    monkeypatch.setattr(row, "checkpoint", broken)
    with pytest.raises(ModelGaveNaN):
        backend.finish(row)


class _NaNVae:
    dtype = torch.float32
    use_tiling = False

    def __init__(self, config) -> None:
        self.config = config

    def decode(self, latents, return_dict):
        return (torch.full((1, 3, 64, 64), float("nan")),)


def test_a_batch_that_does_not_fit_is_evaluated_in_parts(asked, backend, generated, monkeypatch):
    rows = [backend.begin(asked(seed=seed, steps=1)) for seed in range(3)]
    whole = unet_step._evaluate

    def short_of_memory(batch):
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return whole(batch)

    monkeypatch.setattr(unet_step, "_evaluate", short_of_memory)
    backend.advance(rows)
    monkeypatch.undo()
    for row, alone in zip(rows, generated(*(asked(seed=seed, steps=1) for seed in range(3))), strict=True):
        assert np.allclose(row.latents, alone.latents, atol=1e-5)


def test_an_image_that_does_not_fit_alone_is_a_typed_error(asked, backend, monkeypatch):
    def no_memory(batch):
        raise torch.OutOfMemoryError

    row = backend.begin(asked())
    monkeypatch.setattr(unet_step, "_evaluate", no_memory)
    [advance] = backend.advance([row])
    assert isinstance(advance.error, ResourceExhausted)


class _HalfDevice(CpuDevice):
    dtype = torch.float16


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m"])
def test_half_precision_as_on_a_gpu_generates(scheduler, asked, control):
    backend = TorchBackend(ModelManager(open_device=lambda wanted: _HalfDevice()), threads=1)
    start = Start(image=Image.new("RGB", (64, 64), "red"), strength=0.9, mask=Image.new("L", (64, 64), 255))
    controls = (control("canny", end=0.5),)
    row = backend.begin(
        asked(scheduler=scheduler, steps=3, controls=controls, guess_mode=True, start=start, preview_every_steps=1)
    )
    while not row.is_finished:
        assert backend.advance([row])[0].error is None
    assert row.checkpoint.dtype == torch.float16
    finished = backend.finish(row)
    assert (finished.pixels.shape, finished.dtype) == ((64, 64, 3), "float16")


def test_a_large_image_goes_through_the_vae_in_tiles(asked, generated, backend, monkeypatch):
    [row] = generated(asked(steps=1, width_px=192, height_px=160))
    whole = backend.finish(row).pixels.astype(int)
    monkeypatch.setattr(vae_module, "TILED_ABOVE_PIXELS", 100 * 100)
    tiled = backend.finish(row).pixels.astype(int)
    assert tiled.shape == whole.shape
    assert not np.array_equal(tiled, whole)
    assert np.abs(tiled - whole).mean() < 20
    assert row.checkpoint.vae.use_tiling is False


def test_previews_of_sd_are_told_from_the_latents_channels(asked, backend, monkeypatch):
    row = backend.begin(asked(width_px=256, height_px=128))
    monkeypatch.setattr(type(row.checkpoint.entry), "base", "sd1")
    monkeypatch.setattr(row, "checkpoint", replace(row.checkpoint, vae=SimpleNamespace(config={})))
    assert LatentPreview(row.checkpoint, row.predicted_original).pixels().shape == (32, 64, 3)


def test_a_taesd_that_is_damaged_costs_no_image(asked, tmp_path):
    file = tmp_path / "taesd.safetensors"
    file.write_bytes(b"half a file")
    tiny = VaeEntry(id="taesd", path=file, latent_factor=4, latent_channels=4, is_tiny=True, size_bytes=11)
    backend = TorchBackend(ModelManager(device="cpu", tiny_vae_of=lambda entry: tiny), threads=1)
    [advance] = backend.advance([backend.begin(asked(preview_every_steps=1))])
    assert Image.open(io.BytesIO(advance.progress.preview.encode())).size == (64, 64)


def test_previews_are_a_taesds_where_one_is_held(asked, backend, monkeypatch):
    row = backend.begin(asked(width_px=256, height_px=128))
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
        upsampling_scaling_factor=2,
    )
    monkeypatch.setattr(
        row, "checkpoint", replace(row.checkpoint, vae=SimpleNamespace(config={}), tiny_vae=tiny.eval())
    )
    assert LatentPreview(row.checkpoint, row.predicted_original).pixels().shape == (64, 128, 3)
