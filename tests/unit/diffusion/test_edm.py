"""Checkpoints of the EDM kind are sampled by diffusers' EDM schedulers, whatever usual name a request has."""

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from fanlight.errors import InvalidField
from services.diffusion.schedulers import base_config, make_scheduler

PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002}
COSXL = {
    "_class_name": "EDMEulerScheduler",
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_max": 120.0,
    "sigma_min": 0.002,
    "sigma_schedule": "exponential",
}


def made(name, config, noise_schedule=""):
    return make_scheduler(
        name,
        base_config(config),
        noise_schedule=noise_schedule,
        steps=12,
        seed=1,
        shape=(1, 4, 8, 8),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("name", "cls", "options"),
    [
        ("euler", EDMEulerScheduler, {}),
        ("ddim", EDMEulerScheduler, {}),
        ("edm_euler", EDMEulerScheduler, {}),
        ("dpmpp_2m", EDMDPMSolverMultistepScheduler, {}),
        ("dpmpp_2m_sde", EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (
            "dpmpp_2m_sde_heun",
            EDMDPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        ),
    ],
)
@pytest.mark.parametrize("config", [PLAYGROUND, COSXL], ids=["playground", "cosxl"])
def test_usual_names_mean_diffusers_schedulers_of_that_kind(name, cls, options, config):
    scheduler = made(name, config)
    assert type(scheduler).__name__ == cls.__name__
    expected = cls(**{key: value for key, value in config.items() if key != "_class_name"}, **options)
    expected.set_timesteps(12)
    assert torch.equal(scheduler.sigmas, expected.sigmas)
    assert {key: scheduler.config[key] for key in options} == options
    assert scheduler.config.prediction_type == expected.config.prediction_type


@pytest.mark.parametrize("config", [PLAYGROUND, COSXL], ids=["playground", "cosxl"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun"])
def test_a_perfect_model_ends_at_its_image(name, config):
    scheduler = made(name, config)
    image = torch.full((1, 4, 8, 8), 0.7)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    width = config["sigma_data"]
    sign = -1 if config.get("prediction_type") == "v_prediction" else 1
    for number, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[number]
        scheduler.scale_model_input(latents, timestep)
        # Karras et al. 2022, table 1: c_skip and c_out.
        kept = width**2 / (sigma**2 + width**2)
        predicted = sign * (image - kept * latents) * (sigma**2 + width**2).sqrt() / (sigma * width)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    assert torch.allclose(latents, image, atol=0.02)


def test_timesteps_are_a_quarter_of_the_logarithm_of_the_noise():
    scheduler = made("euler", COSXL)
    assert np.allclose(scheduler.timesteps.numpy(), 0.25 * np.log(scheduler.sigmas[:-1].numpy()), atol=1e-5)
    assert float(scheduler.sigmas[0]) == pytest.approx(120.0, rel=1e-4)


def test_the_noise_falls_as_asked():
    karras, exponential = made("euler", COSXL, "karras"), made("euler", PLAYGROUND, "exponential")
    assert (karras.config.sigma_schedule, exponential.config.sigma_schedule) == ("karras", "exponential")


@pytest.mark.parametrize("name", ["heun", "lcm", "pndm", "unipc", "euler_a", "dpmpp_3m_sde"])
def test_schedulers_of_another_kind_are_refused_by_name(name):
    with pytest.raises(InvalidField, match=rf"is {name}.*euler, ddim, dpmpp_2m") as raised:
        made(name, PLAYGROUND)
    assert raised.value.field == "scheduler"


def test_a_schedule_of_another_kind_is_refused_by_name():
    with pytest.raises(InvalidField, match="karras and exponential") as raised:
        made("euler", COSXL, "sgm_uniform")
    assert raised.value.field == "noise_schedule"
