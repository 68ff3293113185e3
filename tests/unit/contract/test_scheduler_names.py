"""Schedulers go by our names, A1111's and diffusers'; a name may say its noise schedule."""

import pytest

from fanlight.contract.schedulers import SHORT_NAMES, resolve
from fanlight.errors import InvalidField, NotFound

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
