"""A seed gives the diffusers pipelines' image, alone and among strangers."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.images import encode_png
from services.diffusion.models.scan import scan
from tests.fakes.diffusers_reference import SCHEDULERS, Reference
from tests.fakes.models import make_tiny_model

LATENTS_LIMIT = 1e-4
PIXELS_LIMIT = 1e-3
# Rounded to 8 bits, two pixels that differ by less than that may still be one apart.
BYTES_LIMIT = 1


@pytest.fixture(scope="module")
def reference(models) -> Reference:
    return Reference(models)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text2img_equals_the_pipeline(scheduler, reference, asked, generated):
    generation = asked(scheduler=scheduler, steps=4)
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize(
    ("scheduler", "noise_schedule"),
    [
        ("ddim", "sgm_uniform"),
        ("euler", "karras"),
        ("euler", "exponential"),
        ("euler", "sgm_uniform"),
        ("euler_a", "sgm_uniform"),
        ("dpmpp_2m", "karras"),
        ("dpmpp_2m", "exponential"),
        ("dpmpp_2m_sde", "karras"),
        ("dpm2_a", "karras"),
        ("heun", "karras"),
        ("lms", "karras"),
        ("unipc", "karras"),
    ],
)
def test_noise_falls_as_asked(scheduler, noise_schedule, reference, asked, generated):
    generation = asked(scheduler=scheduler, noise_schedule=noise_schedule, steps=4)
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize(
    "fields",
    [
        {"scheduler": "lcm", "guidance_scale": 1.0, "steps": 2},
        {"scheduler": "euler_a", "noise_schedule": "sgm_uniform", "guidance_scale": 0.0, "steps": 1},
        {"scheduler": "tcd", "guidance_scale": 1.0, "eta": 0.3, "steps": 2},
    ],
    ids=["lcm", "turbo", "tcd"],
)
def test_a_few_steps_without_guidance_equal_the_pipeline(fields, reference, asked, generated):
    generation = asked(**fields)
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_eta_adds_the_pipelines_noise(reference, asked, generated):
    generation = asked(eta=0.7)
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_equals_the_pipelines(clip_skip, reference, asked, generated):
    """On both sides, as in A1111; the pipelines' own option leaves the negative prompt as it is."""
    generation = asked(clip_skip=clip_skip)
    [row] = generated(generation)
    pipeline = reference.pipeline(generation)
    negative = pipeline.encode_prompt(generation.negative_prompt, "cpu", 1, False, clip_skip=clip_skip - 1 or None)[0]
    latents = reference.latents(generation, negative_prompt=None, negative_prompt_embeds=negative)
    assert _difference(row.latents, latents) <= LATENTS_LIMIT


@pytest.mark.parametrize("scheduler", ["ddim", "heun", "dpmpp_2m"])
def test_two_controlnets_with_start_and_end_equal_the_pipeline(scheduler, reference, asked, control, generated):
    controls = (control("canny", scale=1.3, end=0.6), control("depth", scale=0.4, start=0.4))
    generation = asked(scheduler=scheduler, controls=controls)
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_without_guidance_the_pipeline_is_equalled_too(reference, asked, control, generated):
    generation = asked(guidance_scale=1.0, controls=(control("canny"),))
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_sides_that_the_unet_cannot_halve_evenly_equal_the_pipeline(reference, asked, control, generated):
    generation = asked(width_px=76, height_px=44, controls=(control("canny", size_px=(76, 44)),))
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_the_decoded_image_equals_the_pipelines(reference, asked, generated, backend):
    generation = asked()
    [row] = generated(generation)
    wanted = (reference.pixels(generation) * 255).round().astype(int)
    assert np.abs(backend.finish(row).pixels.astype(int) - wanted).max() <= BYTES_LIMIT


def test_strangers_in_the_batch_change_nothing(reference, asked, generated):
    strangers = [
        asked(scheduler=scheduler, seed=seed, steps=3 + seed % 3, guidance_scale=2.0 + seed, prompt=f"stranger {seed}")
        for seed, scheduler in enumerate(["ddim", "euler", "euler_a", "dpmpp_2m", "heun", "lcm", "pndm", "unipc"])
    ]
    rows = generated(*strangers, joins=(0, 2, 1, 3, 0, 0, 4, 1))
    for generation, row in zip(strangers, rows, strict=True):
        assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_strangers_with_other_control_images_scales_and_ends_change_nothing(asked, control, generated):
    ends = (1.0, 0.5, 0.2)
    strangers = [
        asked(seed=seed, controls=(control("canny", scale=seed / 2, end=end), control("depth", start=0.3)))
        for seed, end in enumerate(ends)
    ]
    together = generated(*strangers, joins=(0, 1, 3))
    for generation, row in zip(strangers, together, strict=True):
        [alone] = generated(generation)
        assert _difference(row.latents, alone.latents) <= LATENTS_LIMIT


def test_a_long_prompt_shares_the_batch_with_short_ones(asked, generated, backend):
    long, short = asked(prompt="a very long story " * 20), asked(prompt="a cat")
    together = generated(long, short)
    for generation, row in zip((long, short), together, strict=True):
        [alone] = generated(generation)
        pixels = [backend.finish(each).pixels.astype(float) / 255 for each in (row, alone)]
        assert np.abs(pixels[0] - pixels[1]).max() <= max(PIXELS_LIMIT, BYTES_LIMIT / 255)


def test_epsilon_models_are_generated_as_their_config_says(tmp_path, asked, backend):
    folder = make_tiny_model(tmp_path / "epsilon", prediction_type="epsilon")
    generation = replace(asked(scheduler="euler_a"), checkpoint=scan([folder]).default())
    row = backend.begin(generation)
    while not row.is_finished:
        backend.advance([row])
    assert _difference(row.latents, Reference(folder).latents(generation)) <= LATENTS_LIMIT


def test_a_control_image_of_another_size_is_scaled_as_the_pipeline_does(reference, parser, generated):
    large = np.random.RandomState(1).randint(0, 256, (150, 90, 3), dtype=np.uint8)
    request = diffusion_pb2.GenerateRequest(prompt="a cat", steps=3, seed=7, resize="stretch")
    added = request.controls.add(controlnet="canny")
    added.image.data = encode_png(large)
    generation = parser.parse(request)
    [row] = generated(generation)
    unscaled = replace(generation, controls=(replace(generation.controls[0], image=Image.fromarray(large)),))
    assert _difference(row.latents, reference.latents(unscaled)) <= LATENTS_LIMIT


def _difference(one, other) -> float:
    return float((one - other).abs().max())
