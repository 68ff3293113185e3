"""What the contract says of schedulers is what diffusers' classes can do; noise along a path is one path."""

import inspect

import pytest
import torch

from fanlight.contract.schedulers import CLASSES
from services.diffusion.schedulers import BrownianNoise, scheduler_class


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
