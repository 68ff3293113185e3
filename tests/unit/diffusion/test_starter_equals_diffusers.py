"""The model that ships: its images are the diffusers pipelines', and show what they were asked for."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from services.diffusion.engine.generation import ControlInput, Generation, Start
from services.diffusion.models.scan import scan, starter_folder
from tests.fakes.diffusers_reference import Reference

LATENTS_LIMIT = 1e-4
# Rounded to 8 bits, two pixels that differ by less than that may still be one apart.
BYTES_LIMIT = 1


@pytest.fixture(scope="module")
def starter():
    return scan([starter_folder()])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(starter_folder())


@pytest.fixture(scope="module")
def asked(starter) -> Callable[..., Generation]:
    """A Generation of few steps at the starter's own size."""
    checkpoint = starter.default()

    def ask(**fields) -> Generation:
        size = {"width_px": checkpoint.width_px, "height_px": checkpoint.height_px}
        defaults = {"prompt": "a red apple on a blue background", "guidance_scale": 4.0, "scheduler": "ddim"}
        return Generation(checkpoint=checkpoint, **{**size, **defaults, "steps": 4, "seed": 7, **fields})

    return ask


@pytest.fixture(scope="module")
def outline(starter) -> Callable[..., ControlInput]:
    """The canny ControlNet with the outline of a disc with a stem: what an apple's edges could be."""
    checkpoint = starter.default()
    image = Image.new("RGB", (checkpoint.width_px, checkpoint.height_px))
    pen = ImageDraw.Draw(image)
    pen.ellipse((12, 16, 52, 58), outline="white")
    pen.line((32, 16, 36, 6), fill="white")

    def make(**fields) -> ControlInput:
        return ControlInput(controlnet=starter.controlnet("canny", checkpoint), image=image, **fields)

    return make


@pytest.fixture(scope="module")
def photo(starter) -> Image.Image:
    """Green above, yellow below."""
    checkpoint = starter.default()
    image = Image.new("RGB", (checkpoint.width_px, checkpoint.height_px), "green")
    image.paste("yellow", (0, checkpoint.height_px // 2, checkpoint.width_px, checkpoint.height_px))
    return image


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpmpp_2m"])
def test_its_image_is_the_pipelines_with_v_prediction_in_every_scheduler(scheduler, reference, asked, generated):
    generation = asked(scheduler=scheduler)
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m"])
def test_its_controlnet_with_nine_residuals_conditions_as_in_the_pipeline(
    scheduler, reference, asked, outline, generated
):
    generation = asked(scheduler=scheduler, controls=(outline(scale=0.8, end=0.75),))
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("is_controlled", [False, True])
def test_what_starts_from_an_image_ends_as_in_the_pipeline(
    is_masked, is_controlled, reference, asked, outline, photo, generated
):
    mask = Image.new("L", photo.size) if is_masked else None
    if mask:
        mask.paste(255, (16, 16, 64, 64))
    start = Start(image=photo, strength=0.8, mask=mask)
    generation = asked(start=start, controls=(outline(),) if is_controlled else ())
    [row] = generated(generation)
    assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_strangers_in_its_batch_change_nothing(reference, asked, generated):
    strangers = [asked(), asked(prompt="the ghost, flat style", seed=3, steps=3, scheduler="euler", guidance_scale=7.0)]
    for generation, row in zip(strangers, generated(*strangers, joins=(0, 1)), strict=True):
        assert _difference(row.latents, reference.latents(generation)) <= LATENTS_LIMIT


def test_its_decoded_image_is_the_pipelines(reference, asked, generated, backend):
    generation = asked()
    [row] = generated(generation)
    wanted = (reference.pixels(generation) * 255).round().astype(int)
    assert np.abs(backend.finish(row).pixels.astype(int) - wanted).max() <= BYTES_LIMIT


def test_it_draws_the_thing_and_the_background_that_were_named(asked, generated, backend):
    [apple] = generated(asked(steps=12))
    image = backend.finish(apple).pixels.astype(int)
    border = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
    middle = np.median(image[24:40, 24:40].reshape(-1, 3), axis=0)
    assert border.argmax() == 2, "the background is blue"
    assert middle.argmax() == 0, "the apple is red"


def test_its_control_image_changes_the_image(asked, outline, generated):
    [free] = generated(asked(steps=3))
    [controlled] = generated(asked(steps=3, controls=(outline(),)))
    assert _difference(free.latents, controlled.latents) > 0.1


def _difference(one, other) -> float:
    return float((one - other).abs().max())
