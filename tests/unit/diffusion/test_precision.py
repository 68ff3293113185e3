"""A card's number type is chosen by what it can; what leaves its range is tried again in float32, the VAE first."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from services.diffusion.config import DiffusionSettings
from services.diffusion.engine.backend import TorchBackend
from services.diffusion.engine.generation import Start
from services.diffusion.engine.vae import ModelGaveNaN
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.precision import precision_of_card
from services.diffusion.models.scan import scan
from services.kernel import process

# Larger than float16 has, and small enough for float32.
BEYOND_FLOAT16 = 1e6


@pytest.mark.parametrize(
    ("name", "capability", "wanted"),
    [
        ("NVIDIA GeForce GTX 980", (5, 2), "float32"),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), "float16"),
        ("Tesla P100-PCIE-16GB", (6, 0), "float16"),
        ("Tesla V100-SXM2-16GB", (7, 0), "float16"),
        ("NVIDIA GeForce GTX 1650", (7, 5), "float32"),
        ("NVIDIA GeForce GTX 1660 SUPER", (7, 5), "float32"),
        ("NVIDIA GeForce GTX 1660 Ti with Max-Q Design", (7, 5), "float32"),
        ("NVIDIA GeForce MX450", (7, 5), "float32"),
        ("NVIDIA T600 Laptop GPU", (7, 5), "float32"),
        ("NVIDIA T1000 8GB", (7, 5), "float32"),
        ("Tesla T4", (7, 5), "float16"),
        ("NVIDIA GeForce RTX 2060", (7, 5), "float16"),
        ("Quadro RTX 4000", (7, 5), "float16"),
        ("NVIDIA GeForce RTX 3060", (8, 6), "bfloat16"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "bfloat16"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "bfloat16"),
    ],
)
def test_a_card_computes_in_what_it_can(name, capability, wanted):
    assert precision_of_card(name, capability) == wanted


def test_the_card_is_known_before_torch_is(monkeypatch):
    monkeypatch.setattr(process, "count_gpus", lambda: 2)
    monkeypatch.setattr(process, "card_of", lambda number: ("NVIDIA GeForce GTX 1650", (7, 5)) if number == 1 else None)
    assert ModelManager(device="cuda:1").precision == "float32"
    assert ModelManager(device="auto").precision == "float16"
    monkeypatch.setattr(process, "card_of", lambda number: ("NVIDIA GeForce RTX 4090", (8, 9)))
    assert ModelManager(device="auto").precision == "bfloat16"
    assert ModelManager(device="auto", precision="float16").precision == "float16"
    assert ModelManager(device="cpu").precision == "float32"


def test_the_precision_can_be_set(catalog):
    manager = ModelManager(device="cpu", precision="bfloat16")
    before = manager.precision
    checkpoint = manager.checkpoint(catalog.default())
    assert (before, manager.precision, str(checkpoint.dtype)) == ("bfloat16", "bfloat16", "torch.bfloat16")


def test_a_precision_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv("FANLIGHT_DIFFUSION_PRECISION", "float8")
    with pytest.raises(ValidationError):
        DiffusionSettings()


@pytest.fixture
def damaged(models, tmp_path, asked):
    """A generation with the tiny model, one tensor of which was multiplied, and whose VAE computes as its UNet does."""

    def make(file, tensor, factor=BEYOND_FLOAT16, **fields):
        folder = tmp_path / "models"
        shutil.copytree(models, folder, dirs_exist_ok=True)
        path = next(folder.rglob(file))
        tensors = load_file(path)
        tensors[tensor] = tensors[tensor] * factor
        save_file(tensors, path)
        config = next(folder.rglob("vae/config.json"))
        config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
        checkpoint = scan([folder]).default()
        return replace(asked(steps=2, **fields), checkpoint=checkpoint)

    return make


UNET = ("unet/diffusion_pytorch_model.safetensors", "conv_out.weight")
VAE = ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight")


def finished(backend, generation):
    row, again = backend.begin(generation), 0
    while not row.is_finished:
        [result] = backend.advance([row])
        if result.error:
            raise result.error
        if result.is_again:
            row, again = backend.begin_again(row), again + 1
    return backend.finish(row), again


def test_a_vae_that_gives_nan_is_tried_in_float32(damaged):
    generation = damaged(*VAE)
    half, _ = finished(TorchBackend(ModelManager(device="cpu", precision="float16"), threads=1), generation)
    assert (half.dtype, half.vae_dtype) == ("float16", "float32")
    assert half.warnings == ("the VAE gave NaN in float16; it decoded again in float32",)
    full, _ = finished(TorchBackend(ModelManager(device="cpu"), threads=1), generation)
    assert np.abs(half.pixels.astype(int) - full.pixels.astype(int)).mean() < 16


def test_a_unet_that_gives_nan_is_begun_again_in_float32(damaged):
    generation = damaged(*UNET)
    half, again = finished(TorchBackend(ModelManager(device="cpu", precision="float16"), threads=1), generation)
    full, _ = finished(TorchBackend(ModelManager(device="cpu"), threads=1), generation)
    assert (again, half.dtype, half.vae_dtype) == (1, "float32", "float32")
    assert half.warnings == ("the model gave NaN in float16; the image was made again in float32",)
    assert full.warnings == ()
    assert np.array_equal(half.pixels, full.pixels)


def test_a_request_that_asked_for_the_type_gets_the_error(damaged):
    backend = TorchBackend(ModelManager(device="cpu", precision="float16"), threads=1)
    with pytest.raises(ModelGaveNaN):
        finished(backend, damaged(*UNET, precision="float16"))


@pytest.mark.parametrize("part", [UNET, VAE], ids=["unet", "vae"])
def test_what_gives_nan_in_float32_too_is_a_failure(damaged, part):
    backend = TorchBackend(ModelManager(device="cpu", precision="bfloat16"), threads=1)
    with pytest.raises(ModelGaveNaN):
        finished(backend, damaged(*part, factor=float("nan")))


def test_neighbors_of_the_batch_are_not_begun_again(damaged, asked):
    backend = TorchBackend(ModelManager(device="cpu", precision="float16"), threads=1)
    rows = [backend.begin(damaged(*UNET)), backend.begin(asked(steps=2))]
    first, second = backend.advance(rows)
    assert (first.is_again, second.is_again, second.progress.step) == (True, False, 1)


def test_one_in_float32_shares_a_batch_with_all_kinds_of_strangers(asked):
    """Each is as alone, while they join at different steps and one of them is taken out."""
    backend = TorchBackend(ModelManager(device="cpu", precision="float16"), threads=1)
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (8, 8, 40, 40))
    red = Image.new("RGB", (64, 64), "red")
    wanted = [
        asked(steps=4, scheduler="unipc"),
        asked(steps=5, scheduler="dpmpp_2m", prompt="a [cat:dog:2] AND a tree :0.5", prompt_syntax="a1111"),
        asked(steps=6, scheduler="heun", start=Start(image=red, strength=0.7, mask=mask), preview_every_steps=1),
        asked(steps=4, scheduler="dpmpp_sde", variation_seed=3, variation_strength=0.5),
        asked(steps=4, scheduler="ddim", eta=1.0),
    ]

    def begun(number):
        row = backend.begin(wanted[number])
        return row if number else backend.begin_again(row)

    def advanced(rows):
        results = backend.advance(rows)
        assert not any(result.error or result.is_again for result in results)

    alone = [begun(number) for number in range(len(wanted))]
    for row in alone:
        while not row.is_finished:
            advanced([row])
    rows, gone = [begun(number) for number in range(len(wanted))], backend.begin(wanted[1])
    advanced([rows[1], gone, rows[0]])
    while left := [row for row in rows if not row.is_finished]:
        advanced(left)
    assert [str(row.checkpoint.dtype) for row in rows] == ["torch.float32", *["torch.float16"] * 4]
    for own, other in zip(rows, alone, strict=True):
        assert torch.allclose(own.latents, other.latents, rtol=0.02, atol=0.05), own.generation.scheduler
