"""Schedulers go by our names, A1111's and diffusers'; each can what its class can."""

import inspect

import pytest
import torch

from services.diffusion.schedulers.brownian import BrownianNoise
from services.diffusion.schedulers.classes import scheduler_class
from services.diffusion.schedulers.names import CLASSES, SCHEDULERS, SHORT_NAMES, resolve
from services.diffusion.wire import scheduler_names
from services.kernel.errors import InvalidField, NotFound

A1111_SAMPLERS = [
    "DPM++ 2M",
    "DPM++ SDE",
    "DPM++ 2M SDE",
    "DPM++ 2M SDE Heun",
    "DPM++ 2S a",
    "DPM++ 3M SDE",
    "Euler a",
    "Euler",
    "LMS",
    "Heun",
    "DPM2",
    "DPM2 a",
    "DDIM",
    "PLMS",
    "UniPC",
    "LCM",
    "DPM++ 2M Karras",
    "DPM++ SDE Karras",
    "DPM++ 2M SDE Exponential",
    "DPM++ 2M SDE Karras",
    "DPM++ 2S a Karras",
    "LMS Karras",
    "DPM2 Karras",
    "DPM2 a Karras",
    "Euler SGM Uniform",
]


@pytest.mark.parametrize("name", A1111_SAMPLERS)
def test_a1111s_samplers_are_known(name):
    base, schedule = resolve(name)
    assert base in SHORT_NAMES
    assert schedule == next((each for each in ("karras", "exponential") if each in name.lower()), "") or schedule


@pytest.mark.parametrize(
    ("name", "asked", "wanted"),
    [
        ("", "", ("ddim", "")),
        ("dpm++ 2m karras", "", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_karras", "", ("dpmpp_2m", "karras")),
        ("Euler a", "SGM Uniform", ("euler_a", "sgm_uniform")),
        ("EulerDiscreteScheduler", "karras", ("EulerDiscreteScheduler", "karras")),
        ("LMS Karras", "karras", ("lms", "karras")),
    ],
)
def test_a_name_and_its_noise_schedule(name, asked, wanted):
    assert resolve(name, asked) == wanted


@pytest.mark.parametrize(
    ("name", "asked", "error", "field"),
    [
        ("DPM adaptive", "", NotFound, "scheduler"),
        ("FlowMatchEulerDiscreteScheduler", "", NotFound, "scheduler"),
        ("euler", "polyexponential", NotFound, "noise_schedule"),
        ("ddim", "karras", InvalidField, "noise_schedule"),
        ("DPM++ 2M Karras", "exponential", InvalidField, "noise_schedule"),
    ],
)
def test_what_is_not_there_is_refused(name, asked, error, field):
    with pytest.raises(error) as caught:
        resolve(name, asked)
    assert caught.value.field == field


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_can_follow_what_its_options_say(name):
    options = inspect.signature(scheduler_class(name).__init__).parameters
    can = {
        "karras": "use_karras_sigmas" in options,
        "exponential": "use_exponential_sigmas" in options,
        "sgm_uniform": "timestep_spacing" in options,
    }
    assert {schedule for schedule, possible in can.items() if possible} == set(CLASSES[name][1])


def test_every_compatible_class_of_diffusers_is_there():
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    assert {scheduler.name for scheduler in KarrasDiffusionSchedulers} <= set(CLASSES)


def test_a_brownian_path_is_one_path():
    noise = BrownianNoise(seed=3, shape=(1, 4, 64, 64), dtype=torch.float32, device=torch.device("cpu"))
    whole = noise(4.0, 1.0) * 3**0.5
    parts = noise(4.0, 2.0) * 2**0.5 + noise(2.0, 1.0)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert abs(float(noise(2.0, 0.5).std()) - 1) < 0.05


def test_the_same_seed_gives_the_same_path():
    one, other = (
        BrownianNoise(seed=3, shape=(1, 4, 8, 8), dtype=torch.float32, device=torch.device("cpu")) for _ in range(2)
    )
    assert torch.equal(one(9.0, 2.0), other(9.0, 2.0))
    assert torch.equal(one(9.0, 4.0), other(9.0, 4.0))


def test_every_name_on_offer_is_understood():
    names = scheduler_names()
    assert len(set(names)) == len(names)
    assert {"ddim", "dpmpp_2m_karras", "DPM++ 2M Karras", "Euler a", "LMSDiscreteScheduler"} <= set(names)
    assert {resolve(name)[0] for name in names} == set(SCHEDULERS)
