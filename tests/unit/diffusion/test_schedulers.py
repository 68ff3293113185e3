"""What the contract says of schedulers is what diffusers' classes can do; noise along a path is one path."""

import numpy as np
import pytest
import torch

from fanlight.contract.schedulers import CLASSES, SCHEDULERS, SHORT_NAMES
from services.diffusion.noise_schedules import beta_quantile, noise_levels, sigmas_of, whole_timesteps
from services.diffusion.schedulers import BrownianNoise, base_config, make_scheduler, scheduler_class

# The scheduler config of SD 1.5, as its repository has it.
SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
# Noise levels of five steps for those betas, by A1111's modules/sd_schedulers.py run with scipy; Turbo by Forge's;
# those of Align Your Steps interpolate the table of research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html.
LEVELS = {
    "uniform": (14.614641, 4.086081, 1.615580, 0.695150, 0.029167),
    "karras": (14.614641, 4.796535, 1.274100, 0.247950, 0.029167),
    "exponential": (14.614641, 3.088977, 0.652892, 0.137996, 0.029167),
    "polyexponential": (14.614641, 3.088977, 0.652892, 0.137996, 0.029167),
    "sgm_uniform": (14.614641, 5.092408, 2.279730, 1.162865, 0.571189),
    "kl_optimal": (14.614641, 2.632888, 1.294767, 0.711627, 0.335637),
    "align_your_steps": (14.615, 3.226936, 1.396, 0.510047, 0.029),
    "simple": (14.614641, 5.087763, 2.276463, 1.160578, 0.569285),
    "normal": (14.614641, 4.086081, 1.615580, 0.695150, 0.029167),
    "ddim_uniform": (5.134431, 2.292854, 1.168216, 0.574050, 0.041314),
    "beta": (14.614641, 12.052260, 7.321904, 2.591549, 0.029167),
    "turbo": (14.614641, 5.087763, 2.276463, 1.160578, 0.569285),
}


def make(name, noise_schedule, steps=5, *, config=SD15, is_sdxl=False):
    return make_scheduler(
        name,
        base_config(config),
        noise_schedule=noise_schedule,
        steps=steps,
        seed=1,
        shape=(1, 4, 8, 8),
        dtype=torch.float32,
        device=torch.device("cpu"),
        is_sdxl=is_sdxl,
    )


@pytest.mark.parametrize("schedule", LEVELS)
def test_noise_levels_are_a1111s(schedule):
    trained = sigmas_of(make("euler", "").alphas_cumprod.numpy())
    assert noise_levels(schedule, trained, 5, is_sdxl=False) == pytest.approx(LEVELS[schedule], rel=1e-4)


@pytest.mark.parametrize(
    ("is_sdxl", "levels"),
    [
        (False, (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)),
        (True, (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)),
    ],
)
def test_eleven_steps_of_align_your_steps_are_the_papers(is_sdxl, levels):
    scheduler = make("euler", "align_your_steps", 11, is_sdxl=is_sdxl)
    assert scheduler.sigmas.tolist() == pytest.approx([*levels, 0.0], rel=1e-5)


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2s", "dpmpp_2m_sde", "deis", "unipc", "lms"])
@pytest.mark.parametrize("schedule", [each for each in LEVELS if each not in ("sgm_uniform", "karras", "beta")])
def test_a_scheduler_steps_down_the_levels(name, schedule):
    if "exponential" in schedule and name in ("euler", "lms"):
        pytest.skip("diffusers' option takes the ends from the checkpoint's spacing here")
    scheduler = make(name, schedule)
    assert scheduler.sigmas[:5].tolist() == pytest.approx(LEVELS[schedule], rel=1e-4)
    assert len(scheduler.timesteps) == 5
    assert (scheduler.timesteps.diff() <= 0).all()


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm2_a", "dpmpp_sde"])
def test_a_scheduler_of_two_evaluations_steps_down_the_same_levels(name):
    scheduler = make(name, "simple")
    levels = dict.fromkeys(round(level, 4) for level in scheduler.sigmas.tolist())
    assert list(levels)[:5] == pytest.approx(LEVELS["simple"], rel=1e-3)


@pytest.mark.parametrize("name", ["lcm", "tcd", "ddpm"])
def test_a_scheduler_of_whole_timesteps_takes_the_nearest(name):
    assert make(name, "simple").timesteps.tolist() == [999, 799, 599, 399, 199]
    assert make(name, "karras").timesteps.tolist() == [999, 786, 427, 59, 0]


def test_whole_timesteps_never_repeat():
    trained = sigmas_of(make("euler", "").alphas_cumprod.numpy())
    timesteps = whole_timesteps(noise_levels("karras", trained, 150, is_sdxl=False), trained)
    assert (timesteps[0], timesteps[-1], (np.diff(timesteps) < 0).all()) == (999, 0, True)


@pytest.mark.parametrize("part", [0.001, 0.05, 0.25, 0.5, 0.9])
def test_the_quantile_of_the_beta_distribution_is_scipys(part):
    """scipy.stats.beta.ppf(part, 0.6, 0.6), scipy 1.17.1."""
    known = {0.001: 1.855873851745e-05, 0.05: 0.012554456877, 0.25: 0.175680378678, 0.5: 0.5, 0.9: 0.960415594405}
    assert beta_quantile(part, 0.6) == pytest.approx(known[part], rel=1e-6)


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_every_schedule_of_a_scheduler_runs_to_finite_latents(name):
    for schedule in ("", *CLASSES[SCHEDULERS[name].cls][1]):
        for steps in (1, 4, 21):
            scheduler = make(name, schedule, steps)
            latents = torch.ones(1, 4, 8, 8) * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                sample = scheduler.scale_model_input(latents, timestep)
                latents = scheduler.step(sample / (sample.std() + 1), timestep, latents).prev_sample
            assert torch.isfinite(latents).all(), (schedule, steps)


@pytest.mark.parametrize("schedule", ["simple", "exponential", "beta", "sgm_uniform"])
def test_the_schedule_asked_for_takes_the_place_of_the_checkpoints(schedule):
    config = {**SD15, "_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert make("dpmpp_2m_sde", schedule, config=config).sigmas.tolist() == pytest.approx(
        make("dpmpp_2m_sde", schedule).sigmas.tolist()
    )


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


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"])
def test_one_that_is_made_without_all_steps_of_the_training_is_diffusers(name, spacing, monkeypatch):
    ours = scheduler_class(name)
    theirs = ours.__base__
    assert (ours.__name__, theirs.__module__.split(".")[0]) == (name, "diffusers_lean")
    asked = []
    original = theirs._sigma_to_t
    monkeypatch.setattr(theirs, "_sigma_to_t", lambda self, *given: asked.append(1) or original(self, *given))
    config = {**base_config(SD15), "timestep_spacing": spacing}
    made = ours.from_config(config)
    assert len(asked) < 10
    expected = theirs.from_config(config)
    for each in (made, expected):
        each.set_timesteps(7, device="cpu")
    assert torch.equal(made.timesteps, expected.timesteps)
    assert torch.equal(made.sigmas, expected.sigmas)
    assert torch.equal(torch.as_tensor(made.init_noise_sigma), torch.as_tensor(expected.init_noise_sigma))
    assert dict(made.config) == dict(expected.config)
