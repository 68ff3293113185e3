"""Tables of steps against diffusers' own steps: same latents, same noise, same predicted image, in float32."""

import pytest
import torch

from fanlight.contract.schedulers import CLASSES, KARRAS, SCHEDULERS, SHORT_NAMES
from services.diffusion.engine import sampler
from services.diffusion.engine.sampler import TABLES_LIMIT, _step_arguments, _Tables, predicted_original
from services.diffusion.schedulers import base_config, make_scheduler
from services.diffusion.step_tables import NotLinear, step_table

SHAPE = (1, 4, 4, 4)
STEPS = 4
# Of the largest number that goes into a step or comes out of it.
TOLERANCE = 1e-5
FUSED = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")
SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def made(name, noise_schedule, config, steps=STEPS):
    return make_scheduler(
        name,
        base_config(config),
        noise_schedule=noise_schedule,
        steps=steps,
        seed=3,
        shape=SHAPE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def table_of(name, noise_schedule, config, *, eta=0.5, steps=STEPS, first=0):
    scheduler = made(name, noise_schedule, config, steps)
    arguments = _step_arguments(scheduler, torch.Generator("cpu"), eta)
    return step_table(_begun(scheduler, first), scheduler.timesteps[first:], arguments, predicted_original)


def _begun(scheduler, first):
    if first:
        scheduler.set_begin_index(first)
    return scheduler


def assert_same_steps(name, noise_schedule="", *, eta=0.5, steps=STEPS, first=0, **config):
    config = {**SD, **config}
    table = table_of(name, noise_schedule, config, eta=eta, steps=steps, first=first)
    scheduler, other = made(name, noise_schedule, config, steps), made(name, noise_schedule, config, steps)
    _begun(scheduler, first)
    theirs, ours = torch.Generator("cpu").manual_seed(5), torch.Generator("cpu").manual_seed(5)
    arguments = _step_arguments(scheduler, theirs, eta)
    latents = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(6)) * scheduler.init_noise_sigma
    state = torch.zeros(1 + table.remembered, *SHAPE[1:])
    for number, timestep in enumerate(scheduler.timesteps[first:]):
        state[0] = latents[0]
        scaled = scheduler.scale_model_input(latents, timestep)
        assert torch.allclose(scaled, latents * float(table.scales[number]), rtol=TOLERANCE, atol=0)
        assert float(timestep) == pytest.approx(float(table.timesteps[number]), rel=1e-6)
        prediction = torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(number))
        before = latents
        step = scheduler.step(prediction, timestep, latents, **arguments)
        latents = step.prev_sample
        operand = torch.cat([state, prediction, _noise(table.draws[number], ours, other)]).double()
        result = torch.einsum("ok,kchw->ochw", torch.from_numpy(table.matrices[number]).double(), operand)
        state = result[:-1].float()
        size = float(max(before.abs().max(), latents.abs().max(), 1.0))
        assert float((result[0] - latents[0]).abs().max()) <= TOLERANCE * size, (name, noise_schedule, number)
        predicted = predicted_original(scheduler, step)[0]
        size = float(max(before.abs().max(), predicted.abs().max(), 1.0))
        assert float((result[-1] - predicted).abs().max()) <= TOLERANCE * size, (name, noise_schedule, number)


def _noise(draw, generator, other):
    if draw is None:
        return torch.zeros(SHAPE)
    if draw.sigmas is not None:
        return other.noise_sampler(*draw.sigmas)
    return torch.randn(SHAPE, generator=generator, dtype=draw.dtype)


@pytest.mark.parametrize("name", FUSED)
def test_the_steps_are_diffusers_for_every_noise_schedule(name):
    for noise_schedule in ("", *CLASSES[SCHEDULERS[name].cls][1]):
        assert_same_steps(name, noise_schedule)


@pytest.mark.parametrize("name", FUSED)
def test_the_steps_are_diffusers_for_every_prediction_type_and_zero_snr(name):
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        # diffusers' ancestral Euler does not know `sample`.
        if (name, prediction_type) != ("euler_a", "sample"):
            assert_same_steps(name, prediction_type=prediction_type)
    for spacing in ("leading", "trailing", "linspace"):
        assert_same_steps(name, timestep_spacing=spacing, **ZERO_SNR)
    if KARRAS in CLASSES[SCHEDULERS[name].cls][1]:
        assert_same_steps(name, KARRAS, **ZERO_SNR)


@pytest.mark.parametrize("name", [name for name in SHORT_NAMES if name not in (*FUSED, "edm_euler")])
def test_the_steps_of_all_others_are_diffusers_too(name):
    assert_same_steps(name)
    assert_same_steps(name, **ZERO_SNR)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde"])
def test_the_steps_of_the_edm_kind_are_diffusers(name):
    assert_same_steps(name, _class_name="EDMEulerScheduler", prediction_type="epsilon")


@pytest.mark.parametrize("name", FUSED)
def test_one_step_and_those_that_img2img_leaves_are_diffusers(name):
    assert_same_steps(name, steps=1)
    if name not in ("ddim",):
        assert_same_steps(name, steps=6, first=3)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_has_no_table(option):
    with pytest.raises(NotLinear):
        table_of("ddim", "", {**SD, option: True})


def test_ddim_draws_noise_only_where_eta_asks_for_it():
    assert not any(table_of("ddim", "", SD, eta=0.0).draws)
    assert all(table_of("ddim", "", SD, eta=1.0).draws)


def test_only_what_a_later_step_takes_is_remembered():
    remembered = {name: table_of(name, "", SD).remembered for name in FUSED}
    assert remembered == dict.fromkeys(FUSED, 0) | {"dpmpp_2m": 1, "dpmpp_2m_sde": 1, "unipc": 3}


def test_so_many_tables_are_kept_at_most_whatever_requests_ask_for():
    tables, made = _Tables(), []
    for eta in range(3 * TABLES_LIMIT):
        tables.once("usual", lambda: made.append("usual"))
        tables.once(eta, lambda: made.append("other"))
    assert len(tables._tables) == TABLES_LIMIT
    assert made.count("usual") == 1


def test_that_there_is_no_table_is_found_once(asked, backend, monkeypatch):
    tried = []
    monkeypatch.setattr(sampler, "_TABLES", _Tables())
    monkeypatch.setattr(sampler, "_new_table", lambda *_: tried.append(1))
    for seed in range(3):
        assert backend.begin(asked(seed=seed)).sampler.table is None
    assert len(tried) == 1


@pytest.mark.parametrize(("name", "count"), [("ddim", 3), ("euler", 1)])
def test_an_eta_that_changes_nothing_makes_no_table_of_its_own(name, count, asked, backend, monkeypatch):
    tables = _Tables()
    monkeypatch.setattr(sampler, "_TABLES", tables)
    monkeypatch.setattr(sampler, "_new_table", lambda *_: None)
    for eta in (0.0, 0.5, 1.0):
        backend.begin(asked(scheduler=name, eta=eta))
    assert len(tables._tables) == count
