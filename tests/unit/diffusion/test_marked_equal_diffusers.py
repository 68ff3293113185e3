"""A single file with marks gives the image of diffusers' pipeline with the scheduler and latents that they mean."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from services.diffusion.engine.generation import Start
from services.diffusion.engine.vae import decode, usually_scaled
from services.diffusion.models.scan import scan
from tests.fakes.families import make_tiny_sdxl
from tests.fakes.ldm_files import write_ldm_file

LIMIT = 2e-4
MEAN, DEVIATION = (-0.2, 0.3, -0.1, 0.4), (1.4, 0.9, 1.2, 1.1)
EMPTY = torch.zeros(0)
PLAYGROUND = {"edm_mean": torch.tensor(MEAN).view(1, 4, 1, 1), "edm_std": torch.tensor(DEVIATION).view(1, 4, 1, 1)}
COSXL = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
ZERO_SNR = {"v_pred": EMPTY, "ztsnr": EMPTY}
# Playground's levels, as its card's config has them.
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
EDM_V = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction",
    "sigma_schedule": "exponential"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture
def marked(folder, tmp_path, asked):
    """A generation with the model as a single file with these tensors added."""
    config = json.loads((folder / "unet" / "config.json").read_text())

    def mark(tensors, **fields):
        file = write_ldm_file(folder, tmp_path / "marked.safetensors", config=config)
        save_file({**load_file(file), **tensors}, file)
        checkpoint = scan([tmp_path]).default()
        return replace(asked(steps=6, **fields), checkpoint=checkpoint)

    return mark


def pipeline(folder, scheduler, **vae):
    loaded = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    loaded.scheduler = scheduler(loaded.scheduler.config)
    loaded.vae.register_to_config(**vae)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def image_of(pipe, generation):
    """(1, C, h, w)"""
    return pipe(
        prompt=generation.prompt,
        negative_prompt=generation.negative_prompt,
        num_inference_steps=generation.steps,
        guidance_scale=generation.guidance_scale,
        width=generation.width_px,
        height=generation.height_px,
        generator=torch.Generator().manual_seed(generation.seed),
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    ("tensors", "scheduler", "made"),
    [
        (PLAYGROUND, "dpmpp_2m", lambda config: EDMDPMSolverMultistepScheduler(**EDM)),
        (PLAYGROUND, "euler", lambda config: EDMEulerScheduler(**EDM)),
        (COSXL, "euler", lambda config: EDMEulerScheduler(**EDM_V)),
        (COSXL, "dpmpp_2m", lambda config: EDMDPMSolverMultistepScheduler(**EDM_V)),
        (
            ZERO_SNR,
            "euler",
            lambda config: EulerDiscreteScheduler.from_config(
                config,
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
            ),
        ),
    ],
    ids=["playground", "playground-euler", "cosxl", "cosxl-dpmpp", "ztsnr"],
)
def test_the_latents_are_the_pipelines(tensors, scheduler, made, marked, folder, generated):
    generation = marked(tensors, scheduler=scheduler)
    [row] = generated(generation)
    expected = image_of(pipeline(folder, made), generation)
    assert float((row.latents - expected).abs().max() / expected.abs().max()) <= LIMIT


def test_playgrounds_latents_are_decoded_with_its_mean_and_deviation(marked, folder, generated, manager):
    generation = marked(PLAYGROUND, scheduler="euler")
    [row] = generated(generation)
    vae = pipeline(folder, lambda config: EDMEulerScheduler(**EDM)).vae
    with torch.inference_mode():
        ours = decode(row.checkpoint, row.latents)
        mean, deviation = (torch.tensor(each).view(1, 4, 1, 1) for each in (MEAN, DEVIATION))
        theirs = vae.decode(row.latents * deviation / 0.5 + mean).sample
    assert float((ours - theirs).abs().max()) < 1e-3


def test_playgrounds_previews_are_of_latents_as_sdxls_are(marked, manager):
    vae = manager.checkpoint(marked(PLAYGROUND).checkpoint).vae
    mean, deviation = (torch.tensor(each).view(1, 4, 1, 1) for each in (MEAN, DEVIATION))
    latents = torch.randn(1, 4, 4, 4)
    assert torch.allclose(usually_scaled(vae, latents), (latents * deviation / 0.5 + mean) * 0.13025)
    assert usually_scaled(manager.checkpoint(marked(COSXL).checkpoint).vae, latents) is latents


@pytest.mark.parametrize("tensors", [PLAYGROUND, COSXL, ZERO_SNR], ids=["playground", "cosxl", "ztsnr"])
@pytest.mark.parametrize("masked", [False, True])
def test_images_and_masks_start_there_too(tensors, masked, marked, generated):
    pixels = np.random.RandomState(3).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = Image.new("L", (64, 64), 255) if masked else None
    generation = marked(tensors, scheduler="euler")
    generation = replace(generation, start=Start(image=Image.fromarray(pixels), strength=0.6, mask=mask))
    [row] = generated(generation)
    assert bool(torch.isfinite(row.latents).all())
    assert row.evaluations == 3


def test_a_mark_is_honored_over_the_configs_beside_the_file(marked):
    generation = marked(ZERO_SNR)
    assert generation.checkpoint.recipe.scheduler["prediction_type"] == "v_prediction"
    assert generation.checkpoint.recipe.folder is not None
