"""img2img, inpainting and ControlNets on top of them give the diffusers pipelines' images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from services.diffusion.engine.generation import Start
from services.diffusion.models.scan import scan
from tests.fakes.diffusers_reference import SCHEDULERS, Reference
from tests.fakes.families import make_tiny_sd2, make_tiny_sdxl
from tests.fakes.models import make_tiny_model

LATENTS_LIMIT = 1e-4
SIZE_PX = (64, 64)


@pytest.fixture(scope="module")
def reference(models) -> Reference:
    return Reference(models)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.RandomState(3).randint(0, 256, (*SIZE_PX, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """Of whole latents: diffusers takes one pixel of each for all of them."""
    mask = Image.new("L", SIZE_PX, 0)
    mask.paste(255, (8, 16, 48, 56))
    return mask


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_img2img_equals_the_pipeline(scheduler, reference, asked, image, generated):
    generation = asked(scheduler=scheduler, steps=5, start=Start(image=image, strength=0.6))
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m", "heun", "lcm"])
def test_inpainting_equals_the_pipeline(scheduler, strength, reference, asked, image, mask, generated):
    generation = asked(scheduler=scheduler, start=Start(image=image, strength=strength, mask=mask))
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_controlnets_on_an_image_equal_the_pipeline(
    masked, guess_mode, reference, asked, image, mask, control, generated
):
    start = Start(image=image, strength=0.8, mask=mask if masked else None)
    controls = (control("canny", scale=0.7), control("depth", end=0.5))
    generation = asked(start=start, controls=controls, guess_mode=guess_mode)
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_guess_mode_equals_the_pipeline(guidance_scale, reference, asked, control, generated):
    generation = asked(controls=(control("canny"),), guess_mode=True, guidance_scale=guidance_scale, prompt="")
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_images_of_all_pipelines_share_a_batch(reference, asked, image, mask, generated):
    strangers = [
        asked(seed=1, steps=4),
        asked(seed=2, start=Start(image=image, strength=0.5), scheduler="euler_a"),
        asked(seed=3, start=Start(image=image, strength=1.0, mask=mask), scheduler="dpmpp_2m"),
    ]
    rows = generated(*strangers, joins=(0, 1, 2))
    for generation, row in zip(strangers, rows, strict=True):
        assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_images_with_and_without_guess_mode_share_a_batch(reference, asked, control, generated):
    strangers = [asked(seed=seed, controls=(control("canny"),), guess_mode=seed == 1) for seed in range(3)]
    for generation, row in zip(strangers, generated(*strangers), strict=True):
        assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_what_is_not_masked_stays(asked, image, mask, generated, backend):
    [row] = generated(asked(steps=3, start=Start(image=image, strength=1.0, mask=mask)))
    kept = row.latents[..., :4, :]
    [other] = generated(asked(steps=3, prompt="something else", start=Start(image=image, strength=1.0, mask=mask)))
    assert np.array_equal(kept, other.latents[..., :4, :])
    assert not np.array_equal(row.latents, other.latents)


def test_a_net_that_pools_globally_as_shuffle_equals_the_pipeline(tmp_path, models, asked, control, generated):
    shuffle = tmp_path / "controlnet-shuffle"
    shutil.copytree(models / "controlnet-canny", shuffle)
    config = json.loads((shuffle / "config.json").read_text())
    (shuffle / "config.json").write_text(json.dumps({**config, "global_pool_conditions": True}))
    entry = scan([shuffle]).controlnets[0]
    generation = asked(controls=(replace(control("canny"), controlnet=entry),))
    [row] = generated(generation)
    assert _difference(row.latents, Reference(models).latents(generation)) <= LATENTS_LIMIT


def test_pixels_missing_for_the_controlnet_inpaint_equal_the_pipelines(reference, asked, mask, control, generated):
    generation = asked(controls=(control("canny", mask=mask),))
    pixels = np.asarray(generation.controls[0].image, dtype=np.float32) / 255.0
    pixels[np.asarray(mask) > 127] = -1.0
    image = torch.from_numpy(pixels.transpose(2, 0, 1))[None]
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation, image=image)) <= LATENTS_LIMIT


def test_weighted_prompts_equal_the_pipeline_that_is_given_their_embeddings(
    reference, asked, generated, backend, models
):
    generation = asked(prompt="a (cat:1.4) [dog]", negative_prompt="ugly")
    encoder = CLIPTextModel.from_pretrained(models / "model" / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(models / "model" / "tokenizer")

    def states(words, weights):
        pieces = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        ids = [tokenizer.bos_token_id, *(each for piece in pieces for each in piece)]
        column = [1.0, *(weight for piece, weight in zip(pieces, weights, strict=True) for _ in piece)]
        padding = 77 - len(ids)
        plain = encoder(torch.tensor([ids + [tokenizer.eos_token_id] * padding]))[0]
        scaled = plain * torch.tensor(column + [1.0] * padding)[None, :, None]
        return (scaled * (plain.mean() / scaled.mean())).detach()

    given = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": states(["a", "cat", "dog"], [1.0, 1.4, 1 / 1.1]),
        "negative_prompt_embeds": states(["ugly"], [1.0]),
    }
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation, **given)) <= LATENTS_LIMIT


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    """A tiny SDXL with a ControlNet."""
    folder = tmp_path_factory.mktemp("families") / "xl"
    unet = UNet2DConditionModel.from_pretrained(make_tiny_sdxl(folder / "model") / "unet")
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 16))
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=0.1)
    net.save_pretrained(folder / "controlnet-canny")
    return folder


@pytest.mark.parametrize("is_controlled", [False, True], ids=["plain", "controlled"])
@pytest.mark.parametrize("begins", ["noise", "picture", "masked"])
def test_sdxl_equals_every_pipeline(begins, is_controlled, sdxl, asked, image, mask, control, generated):
    catalog = scan([sdxl])
    checkpoint = catalog.default()
    net = catalog.controlnet("canny", checkpoint) if is_controlled else None
    start = {
        "noise": None,
        "picture": Start(image=image, strength=0.6),
        "masked": Start(image=image, strength=0.9, mask=mask),
    }[begins]
    controls = (replace(control("canny", scale=0.8), controlnet=net),) if net else ()
    generation = asked(start=start, controls=controls, scheduler="euler", steps=4)
    generation = replace(generation, checkpoint=checkpoint)
    [row] = generated(generation)
    assert _difference(row.latents, Reference(sdxl).latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_unet_made_for_inpainting_equals_the_pipeline(strength, tmp_path, asked, image, mask, generated):
    folder = tmp_path / "inpainting"
    make_tiny_sd2(folder / "model", in_channels=9)
    start = Start(image=image, strength=strength, mask=mask)
    strangers = [
        replace(asked(seed=seed, steps=4, scheduler=scheduler, start=start), checkpoint=scan([folder]).default())
        for seed, scheduler in enumerate(["ddim", "euler_a"])
    ]
    for generation, row in zip(strangers, generated(*strangers), strict=True):
        assert _difference(row.latents, Reference(folder).latents(generation)) <= LATENTS_LIMIT


def test_a_checkpoint_that_is_told_the_guidance_scale_equals_the_pipeline(tmp_path, asked, generated):
    folder = make_tiny_model(tmp_path / "lcm")
    unet = folder / "model" / "unet"
    config = {**UNet2DConditionModel.load_config(unet), "time_cond_proj_dim": 8}
    UNet2DConditionModel.from_config(config).save_pretrained(unet)
    checkpoint = scan([folder]).default()
    strangers = [
        replace(asked(scheduler="lcm", steps=3, guidance_scale=scale), checkpoint=checkpoint) for scale in (2.0, 8.0)
    ]
    for generation, row in zip(strangers, generated(*strangers), strict=True):
        assert row.conditioning.unconditional is None
        assert _difference(row.latents, Reference(folder).latents(generation)) <= LATENTS_LIMIT


def test_a_strict_image_has_the_same_bits_every_time(asked, image, generated):
    generation = asked(strict=True, start=Start(image=image, strength=0.9), scheduler="euler_a")
    [one], [other] = generated(generation), generated(generation)
    assert torch.equal(one.latents, other.latents)


def _difference(one, other) -> float:
    return float((one - other).abs().max())
