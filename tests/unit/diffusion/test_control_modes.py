"""How much a ControlNet counts in each of the modes of A1111's ControlNet extension."""

from dataclasses import replace

import pytest
import torch

from services.diffusion.engine.controls import ControlRow

# Mikubill/sd-webui-controlnet, scripts/hook.py (003bcda): soft_injection gives the weights 0.825 ** (12 - i) for i in
# range(13), to which an SDXL net brings ten residuals; cfg_injection leaves the unconditional half alone. The control
# mode `My prompt is more important` sets the first, `ControlNet is more important` both.
SOFT = [
    *(0.09941396, 0.12050177, 0.14606275, 0.17704576, 0.21460092, 0.26012233, 0.31529980),
    *(0.38218157, 0.46325039, 0.56151562, 0.68062500, 0.825, 1.0),
]


def row(control, net, mode: str, *, guess_mode: bool = False) -> ControlRow:
    return ControlRow(replace(control("canny"), mode=mode), net, torch.zeros(1), guess_mode=guess_mode)


class Net:
    """The part of a ControlNet's config that matters here."""

    def __init__(self, *, pools: bool = False) -> None:
        self.config = self
        self.global_pool_conditions = pools


@pytest.mark.parametrize(
    ("mode", "guess_mode", "is_one_sided", "weights"),
    [
        ("", False, False, [1.0] * 13),
        ("balanced", False, False, [1.0] * 13),
        ("balanced", True, False, [1.0] * 13),
        ("prompt", False, False, SOFT),
        ("control", False, True, SOFT),
        ("control", True, True, SOFT),
        ("", True, True, [10 ** (-1 + index / 12) for index in range(13)]),
    ],
)
def test_each_mode_has_its_weights(mode, guess_mode, is_one_sided, weights, control):
    own = row(control, Net(), mode, guess_mode=guess_mode)
    assert own.is_one_sided is is_one_sided
    assert own.weights(13) == pytest.approx(weights, rel=1e-5)


def test_an_sdxl_net_has_the_first_ten_weights(control):
    assert row(control, Net(), "prompt").weights(10) == pytest.approx(SOFT[:10], rel=1e-5)


def test_a_net_that_pools_globally_is_one_sided_in_every_mode(control):
    own = row(control, Net(pools=True), "prompt")
    assert own.is_one_sided
    assert own.weights(13) == pytest.approx(SOFT, rel=1e-5)
    assert row(control, Net(pools=True), "", guess_mode=True).weights(13) == [1.0] * 13


@pytest.fixture
def modes(asked, control):
    def ask(*names: str, **fields):
        controls = tuple(replace(control(net), mode=name) for net, name in zip(("canny", "depth"), names, strict=False))
        return asked(controls=controls, steps=3, **fields)

    return ask


def latents(generated, *generations):
    return [row.latents for row in generated(*generations)]


def test_each_mode_gives_its_own_image_in_one_batch_as_alone(modes, generated):
    generations = [modes(name) for name in ("balanced", "prompt", "control")]
    together = latents(generated, *generations)
    for generation, one in zip(generations, together, strict=True):
        assert torch.allclose(latents(generated, generation)[0], one, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(together[1], together[2], atol=1e-3)


def test_each_control_has_a_mode_of_its_own(modes, generated):
    [both, first, second] = latents(
        generated, modes("prompt", "prompt"), modes("prompt", "balanced"), modes("balanced", "prompt")
    )
    assert not torch.allclose(both, first, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-3)


def test_guess_mode_is_for_controls_without_a_mode(modes, generated):
    [plain, guessed, chosen] = latents(
        generated, modes("balanced"), modes("", guess_mode=True), modes("balanced", guess_mode=True)
    )
    assert torch.allclose(plain, chosen, atol=1e-5)
    assert not torch.allclose(plain, guessed, atol=1e-3)


def test_without_guidance_control_and_prompt_are_alike(modes, generated):
    [one, other] = latents(generated, modes("prompt", guidance_scale=1.0), modes("control", guidance_scale=1.0))
    assert torch.allclose(one, other, atol=1e-5)
