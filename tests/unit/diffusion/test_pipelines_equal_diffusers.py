"""img2img, inpainting and ControlNets on top of them give the diffusers pipelines' pictures."""

import numpy as np
import pytest
from PIL import Image

from services.diffusion.generation import Start
from services.kernel.errors import InvalidField
from tests.fakes.diffusers_reference import SCHEDULERS, Reference

LATENTS_LIMIT = 1e-4
SIZE_PX = (64, 64)


@pytest.fixture(scope="module")
def reference(models) -> Reference:
    return Reference(models)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.RandomState(3).randint(0, 256, (*SIZE_PX, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask = Image.new("L", SIZE_PX, 0)
    mask.paste(255, (10, 20, 50, 60))
    return mask


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_img2img_equals_the_pipeline(scheduler, reference, asked, picture, painted):
    generation = asked(scheduler=scheduler, steps=5, start=Start(image=picture, strength=0.6))
    [row] = painted(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m", "heun", "lcm"])
def test_inpainting_equals_the_pipeline(scheduler, strength, reference, asked, picture, mask, painted):
    generation = asked(scheduler=scheduler, start=Start(image=picture, strength=strength, mask=mask))
    [row] = painted(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_controlnets_on_a_picture_equal_the_pipeline(
    masked, guess_mode, reference, asked, picture, mask, control, painted
):
    start = Start(image=picture, strength=0.8, mask=mask if masked else None)
    controls = (control("canny", scale=0.7), control("depth", end=0.5))
    generation = asked(start=start, controls=controls, guess_mode=guess_mode)
    [row] = painted(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_guess_mode_equals_the_pipeline(guidance_scale, reference, asked, control, painted):
    generation = asked(controls=(control("canny"),), guess_mode=True, guidance_scale=guidance_scale, prompt="")
    [row] = painted(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_pictures_of_all_pipelines_share_a_batch(reference, asked, picture, mask, painted):
    strangers = [
        asked(seed=1, steps=4),
        asked(seed=2, start=Start(image=picture, strength=0.5), scheduler="euler_a"),
        asked(seed=3, start=Start(image=picture, strength=1.0, mask=mask), scheduler="dpmpp_2m"),
    ]
    rows = painted(*strangers, joins=(0, 1, 2))
    for generation, row in zip(strangers, rows, strict=True):
        assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_pictures_with_and_without_guess_mode_share_a_batch(reference, asked, control, painted):
    strangers = [asked(seed=seed, controls=(control("canny"),), guess_mode=seed == 1) for seed in range(3)]
    for generation, row in zip(strangers, painted(*strangers), strict=True):
        assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_what_is_not_masked_stays(asked, picture, mask, painted, studio):
    [row] = painted(asked(steps=3, start=Start(image=picture, strength=1.0, mask=mask)))
    kept = row.latents[..., :4, :]
    [other] = painted(asked(steps=3, prompt="something else", start=Start(image=picture, strength=1.0, mask=mask)))
    assert np.array_equal(kept, other.latents[..., :4, :])
    assert not np.array_equal(row.latents, other.latents)


def test_a_strength_that_leaves_no_step_is_refused(asked, picture, studio):
    with pytest.raises(InvalidField, match="leaves none") as caught:
        studio.begin(asked(steps=5, start=Start(image=picture, strength=0.1)))
    assert caught.value.field == "strength"


def _difference(one, other) -> float:
    return float((one - other).abs().max())
