"""Images come to the size that is generated without distortion, unless somebody asks for it."""

import numpy as np
import pytest
import torch
from PIL import Image

from fanlight.contract.masks import Sides
from services.diffusion.canvas import Canvas
from services.diffusion.engine.vae import to_condition, to_mask
from services.diffusion.images import Resize, fit


@pytest.fixture
def bars() -> Image.Image:
    """300 x 100: red, green, blue."""
    image = Image.new("RGB", (300, 100), "green")
    image.paste("red", (0, 0, 100, 100))
    image.paste("blue", (200, 0, 300, 100))
    return image


def test_crop_keeps_the_middle(bars):
    cut = fit(bars, (40, 40), Resize.CROP)
    assert np.ptp(np.asarray(cut)[5:-5, 5:-5].reshape(-1, 3), axis=0).max() <= 1
    assert cut.getpixel((20, 20)) == (0, 128, 0)


def test_stretch_keeps_all(bars):
    whole = fit(bars, (60, 60), Resize.STRETCH)
    assert [whole.getpixel((x, 30)) for x in (10, 30, 50)] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def test_pad_keeps_all_and_its_aspect(bars):
    whole = fit(bars, (60, 60), Resize.PAD)
    assert [whole.getpixel((x, 30)) for x in (10, 30, 50)] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert whole.getpixel((30, 10)) == whole.getpixel((30, 50)) == (0, 0, 0)


def canvas(image, mask, how):
    return Canvas(image=image, mask=mask, sides=Sides(), size_px=(60, 60), how=how)


def test_a_mask_is_white_where_there_was_nothing():
    mask = Image.new("L", (300, 100), 90)
    fitted = canvas(mask.convert("RGB"), mask, Resize.PAD).start_mask
    assert fitted.getpixel((30, 30)) == 90
    assert fitted.getpixel((30, 5)) == 255


@pytest.mark.parametrize("how", Resize)
def test_mask_and_image_are_cut_alike(how):
    image = Image.new("RGB", (90, 60))
    image.paste("white", (30, 20, 70, 50))
    fitted = canvas(image, image.convert("L"), how)
    inside = slice(14, 46)
    white = np.asarray(fitted.start)[inside, 2:-2, 0] >= 128
    assert (white == (np.asarray(fitted.start_mask)[inside, 2:-2] >= 128)).all()


def test_masked_pixels_are_missing_for_the_controlnet_inpaint():
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    condition = to_condition(Image.new("RGB", (8, 8), "white"), mask)
    assert torch.equal(condition[..., :4], torch.full((1, 3, 8, 4), -1.0))
    assert torch.equal(condition[..., 4:], torch.ones(1, 3, 8, 4))
    assert to_mask(mask).sum() == 32
