"""A variation seed's noise is mixed into the seed's, as A1111 mixes it."""

import math

import pytest
import torch
from PIL import Image

from services.diffusion.engine.generation import Start
from services.diffusion.engine.row import slerp
from services.diffusion.provenance import infotext


def a1111_slerp(weight, low, high):
    """What A1111's modules/rng.py does with one image's noise (C, H, W): an angle for each channel and column."""
    low_norm = low / torch.norm(low, dim=1, keepdim=True)
    high_norm = high / torch.norm(high, dim=1, keepdim=True)
    omega = torch.acos((low_norm * high_norm).sum(1))
    so = torch.sin(omega)
    low_part = (torch.sin((1.0 - weight) * omega) / so).unsqueeze(1) * low
    return low_part + (torch.sin(weight * omega) / so).unsqueeze(1) * high


def noise(seed, *, height=8, width=8):
    return torch.randn((1, 4, height, width), generator=torch.Generator("cpu").manual_seed(seed))


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((64, 64), 60).convert("RGB")


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_noise_is_mixed_as_a1111_does(weight):
    low, high = noise(1), noise(2)
    assert torch.allclose(slerp(low, high, weight)[0], a1111_slerp(weight, low[0], high[0]), atol=1e-6)


def test_the_ends_are_the_two_noises_and_the_middle_is_as_far_from_both():
    low, high = noise(1), noise(2)
    assert torch.equal(slerp(low, high, 0.0), low)
    assert torch.equal(slerp(low, high, 1.0), high)
    # For one column, by hand: at half of the angle both have the weight 1 / (2 cos(angle / 2)).
    one, other = low[0, 0, :, 0], high[0, 0, :, 0]
    angle = math.acos(float(one @ other / (one.norm() * other.norm())))
    assert torch.allclose(slerp(low, high, 0.5)[0, 0, :, 0], (one + other) / (2 * math.cos(angle / 2)), atol=1e-6)


@pytest.mark.parametrize("other", [noise(1), noise(1) * 1.001, -noise(1)])
def test_noises_of_one_direction_or_opposite_ones_are_mixed_linearly(other):
    assert torch.allclose(slerp(noise(1), other, 0.25), torch.lerp(noise(1), other, 0.25))


def test_columns_of_one_number_stay_finite():
    """Their angle is 0 or 180 degrees: A1111 divides by its sine."""
    low, high = noise(1, height=1), noise(2, height=1)
    assert torch.isfinite(slerp(low, high, 0.3)).all()
    assert torch.equal(slerp(low, high, 1.0), high)


def test_half_precision_is_mixed_in_single():
    low, high = noise(1).half(), noise(2).half()
    mixed = slerp(low, high, 0.4)
    assert mixed.dtype == torch.float16
    assert torch.equal(mixed, slerp(low.float(), high.float(), 0.4).half())


@pytest.mark.parametrize("starts", ["noise", "image", "masked image"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_at_strength_1_the_image_is_the_variation_seeds_own(starts, strength, asked, generated, image):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 64, 40))
    start = {
        "noise": None,
        "image": Start(image=image, strength=strength),
        "masked image": Start(image=image, strength=strength, mask=mask),
    }[starts]
    [own] = generated(asked(seed=9, start=start))
    [varied] = generated(asked(seed=9, start=start, variation_seed=9, variation_strength=1.0))
    assert torch.equal(varied.latents, own.latents)
    if starts == "noise":
        [varied] = generated(asked(seed=1, start=start, variation_seed=9, variation_strength=1.0))
        assert torch.equal(varied.latents, own.latents)


def test_the_first_noise_after_an_image_is_the_variation_seeds_own(asked, backend, image):
    """Its generator draws the image's latents before, as the seed's does; those themselves stay the seed's."""
    start = Start(image=image, strength=1.0)
    own = backend.begin(asked(seed=9, scheduler="ddim", start=start))
    varied = backend.begin(asked(seed=1, scheduler="ddim", start=start, variation_seed=9, variation_strength=1.0))
    seeds = backend.begin(asked(seed=1, scheduler="ddim", start=start))
    difference = (varied.latents - own.latents).abs().max()
    assert difference < 0.1 * (seeds.latents - own.latents).abs().max()


def test_without_a_variation_seed_not_a_bit_changes(asked, generated):
    [plain], [zero] = generated(asked()), generated(asked(variation_seed=None, variation_strength=0.0))
    assert torch.equal(plain.latents, zero.latents)


def test_a_weak_variation_is_near_the_seeds_image_and_a_strong_one_is_not(asked, generated):
    [plain], [weak], [strong] = (
        generated(asked(**options))
        for options in (
            {},
            {"variation_seed": 5, "variation_strength": 0.05},
            {"variation_seed": 5, "variation_strength": 0.8},
        )
    )
    assert 0 < (weak.latents - plain.latents).norm() < 0.3 * (strong.latents - plain.latents).norm()


def test_images_of_one_batch_vary_each_by_its_own_seed(asked, generated):
    options = [{"variation_seed": seed, "variation_strength": 0.5} for seed in (1, 2)]
    together = generated(*(asked(**each) for each in options))
    alone = [generated(asked(**each))[0] for each in options]
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-4)
    assert not torch.allclose(together[0].latents, together[1].latents, atol=0.1)


def test_a1111s_text_names_seed_and_strength(asked):
    text = infotext(asked(variation_seed=12, variation_strength=0.25), lambda entry: (), version="1")
    assert "Model: tiny, Variation seed: 12, Variation seed strength: 0.25, Version" in text
    assert "Variation" not in infotext(asked(), lambda entry: (), version="1")
