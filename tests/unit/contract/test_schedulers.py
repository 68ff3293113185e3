"""A scheduler goes by every name that people have for it; what has no equal here is refused with near names."""

import pytest

from fanlight.contract.schedulers import CLASSES, NOISE_SCHEDULES, SCHEDULE_TITLES, SCHEDULERS, SHORT_NAMES, resolve
from fanlight.errors import InvalidField, NotFound

# By short name and noise schedule.
SPELLINGS = {
    ("ddim", ""): ["", " ", "ddim", "DDIM", "ddim automatic"],
    ("ddim", "normal"): ["ddim normal"],
    ("ddim", "uniform"): ["ddim_uniform"],
    ("ddpm", ""): ["ddpm", "DDPM"],
    ("pndm", ""): ["pndm", "PLMS", "plms", "k_plms"],
    ("lms", ""): ["lms", "LMS", "k_lms", "sample_lms"],
    ("lms", "karras"): ["LMS Karras", "lmsKarras", "LMSKarras", "lms_karras", "k_lms_ka"],
    ("euler", ""): ["euler", "Euler", "k_euler", "K_EULER", "sample_euler"],
    ("euler", "normal"): ["euler_normal"],
    ("euler", "simple"): ["euler simple", "Euler Simple"],
    ("euler", "beta"): ["euler beta"],
    ("euler", "uniform"): ["Euler Automatic", "Euler Uniform"],
    ("euler", "ddim_uniform"): ["euler ddim_uniform"],
    ("euler", "sgm_uniform"): ["Euler SGM Uniform", "euler_sgm_uniform", "Euler SGMUniform"],
    ("euler_a", ""): [
        *("euler_a", "Euler a", "euler a", "EulerA", "eulerA", "k_euler_a", "k_euler_ancestral"),
        *("euler_ancestral", "sample_euler_ancestral", "Euler  A"),
    ],
    ("heun", ""): ["heun", "Heun", "k_heun", "sample_heun"],
    ("dpm2", ""): ["dpm2", "DPM2", "dpM2", "dpm_2", "k_dpm_2", "sample_dpm_2"],
    ("dpm2", "karras"): ["DPM2 Karras", "dpM2Karras", "DPM2Karras", "dpm_2_karras"],
    ("dpm2_a", ""): ["dpm2_a", "DPM2 a", "dpM2A", "k_dpm_2_a", "dpm_2_ancestral", "sample_dpm_2_ancestral"],
    ("dpm2_a", "karras"): ["DPM2 a Karras", "dpM2AKarras", "DPM2AKarras"],
    ("dpmpp_2s", ""): [
        *("dpmpp_2s", "DPM++ 2S a", "dpm++ 2s", "DPM++2S a", "dpM2SA", "DPM2SA"),
        *("k_dpmpp_2s_a", "dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral"),
    ],
    ("dpmpp_2s", "karras"): ["DPM++ 2S a Karras", "dpM2SAKarras"],
    ("dpmpp_2m", ""): ["dpmpp_2m", "DPM++ 2M", "dpm++2m", "dpM2M", "DPM2M", "k_dpmpp_2m", "sample_dpmpp_2m"],
    ("dpmpp_2m", "karras"): [
        *("DPM++ 2M Karras", "DPM++ 2M KARRAS", "dpmpp_2m_karras", "dpM2MKarras", "DPM2MKarras", "dpmpp_2m karras"),
    ],
    ("dpmpp_2m", "align_your_steps"): ["DPM++ 2M Align Your Steps", "dpmpp_2m_align_your_steps", "DPM++ 2M AYS"],
    ("dpmpp_2m", "turbo"): ["DPM++ 2M Turbo"],
    ("dpmpp_2m", "exponential"): ["dpmpp_2m exponential", "DPM++ 2M Exponential"],
    ("dpmpp_2m_sde", ""): ["dpmpp_2m_sde", "DPM++ 2M SDE", "dpmpp_2m_sde_gpu", "k_dpmpp_2m_sde", "sample_dpmpp_2m_sde"],
    ("dpmpp_2m_sde", "karras"): ["DPM++ 2M SDE Karras", "DPM2MSDEKarras", "dpmpp_2m_sde_gpu karras"],
    ("dpmpp_2m_sde_heun", ""): ["DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"],
    ("dpmpp_3m_sde", ""): ["DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "dpM3MSDE", "k_dpmpp_3m_sde"],
    ("dpmpp_sde", ""): ["DPM++ SDE", "dpmpp_sde", "dpmpp_sde_gpu", "dpmsde", "k_dpmpp_sde", "sample_dpmpp_sde"],
    ("dpmpp_sde", "karras"): ["DPM++ SDE Karras", "dpmsdeKarras", "DPMSDEKarras"],
    ("deis", ""): ["deis", "DEIS"],
    ("unipc", ""): ["unipc", "UniPC", "uniPC", "uni_pc", "uni_pc_bh2"],
    ("lcm", ""): ["lcm", "LCM", "k_lcm"],
    ("tcd", ""): ["tcd", "TCD"],
    ("sa_solver", ""): ["sa_solver", "SA Solver"],
    ("edm_euler", ""): ["edm_euler"],
}


@pytest.mark.parametrize(
    ("spelling", "meant"), [(spelling, meant) for meant, spellings in SPELLINGS.items() for spelling in spellings]
)
def test_every_spelling_means_one_scheduler(spelling, meant):
    assert resolve(spelling) == meant


def test_every_short_name_has_its_spellings_here():
    assert {name for name, _ in SPELLINGS} == set(SHORT_NAMES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_diffusers_is_itself_in_any_case(name):
    assert resolve(name) == resolve(name.lower()) == resolve(name.upper()) == (name, "")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_was_resolved_stays(name):
    assert resolve(*resolve(name)) == (name, "")


@pytest.mark.parametrize("karras", ["karras", "Karras", "KARRAS", " karras "])
def test_a_noise_schedule_goes_by_any_case(karras):
    assert resolve("euler", karras) == ("euler", "karras")


@pytest.mark.parametrize("schedule", ["SGM Uniform", "sgm_uniform", "SGMUniform"])
def test_a_noise_schedule_goes_by_its_spellings(schedule):
    assert resolve("euler_a", schedule) == ("euler_a", "sgm_uniform")


# A1111's modules/sd_samplers_kdiffusion.py, `samplers_k_diffusion`: what its samplers follow for Automatic; those
# without an entry follow Uniform, and those of sd_samplers_timesteps.py and sd_samplers_lcm.py steps of their own.
AUTOMATIC = {
    "DPM++ 2M": "karras",
    "DPM++ SDE": "karras",
    "DPM++ 2M SDE": "exponential",
    "DPM++ 2M SDE Heun": "exponential",
    "DPM++ 2S a": "karras",
    "DPM++ 3M SDE": "exponential",
    "Euler a": "uniform",
    "Euler": "uniform",
    "LMS": "uniform",
    "Heun": "uniform",
    "DPM2": "karras",
    "DPM2 a": "karras",
    "DDIM": "",
    "PLMS": "",
    "UniPC": "",
    "LCM": "",
}


@pytest.mark.parametrize(("sampler", "schedule"), AUTOMATIC.items())
@pytest.mark.parametrize("automatic", ["Automatic", "automatic", " AUTOMATIC "])
def test_automatic_is_what_a1111_follows(sampler, schedule, automatic):
    assert resolve(sampler, automatic)[1] == resolve(f"{sampler} Automatic")[1] == schedule


def test_without_a_noise_schedule_it_is_the_schedulers_own():
    assert resolve("DPM++ 2M", "") == ("dpmpp_2m", "")


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_a_noise_schedule_goes_by_its_name_and_its_title_in_any_case(name):
    title = SCHEDULE_TITLES[name]
    spellings = [name, name.upper(), title, title.lower(), title.upper(), title.replace(" ", ""), f" {title} "]
    assert {resolve("DPM++ 2M", spelling) for spelling in spellings} == {("dpmpp_2m", name)}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_a_pair_is_taken_or_refused_by_name(name, schedule):
    can = CLASSES[SCHEDULERS[name].cls][1]
    if schedule in can:
        assert resolve(*resolve(name, schedule)) == (name, schedule)
    else:
        with pytest.raises(InvalidField, match=f"is {schedule}, which {name} cannot follow"):
            resolve(name, schedule)


@pytest.mark.parametrize("schedule", ["", "karras", "Automatic"])
def test_a_name_that_says_its_schedule_agrees_with_the_same(schedule):
    assert resolve("LMS Karras", schedule) == ("lms", "karras")


@pytest.mark.parametrize(
    "name",
    [
        *("FooScheduler", "IPNDMScheduler", "DDIMParallelScheduler", "FlowMatchEulerDiscreteScheduler"),
        *("DPM fast", "DPM adaptive", "dpmFast", "dpmAdaptive", "DPMFast", "k_dpm_fast", "k_dpm_adaptive", "k_dpm_ad"),
        *("heunpp2", "ipndm", "ipndm_v", "euler_cfg_pp", "res_multistep", "gradient_estimation", "dpm++2mv2"),
        *(
            "dpmsolver",
            "Restart",
            "DDIM CFG++",
            "euler cosine",
            "simple",
            "karras",
            "k_",
            "_",
            "euler;ddim",
            "欧拉",
        ),
    ],
)
def test_what_has_no_equal_is_refused_by_its_name(name):
    with pytest.raises(NotFound, match=r"^there is no scheduler ") as caught:
        resolve(name)

    assert (caught.value.field, repr(name) in caught.value.message) == ("scheduler", True)


@pytest.mark.parametrize(
    ("name", "near"),
    [("IPNDMScheduler", "PNDMScheduler"), ("DDIMParallelScheduler", "DDIMScheduler"), ("eulr_a", "euler_a")],
)
def test_a_refusal_names_near_ones(name, near):
    with pytest.raises(NotFound, match=f"near it: {near}"):
        resolve(name)


def test_a_name_that_is_like_none_is_answered_with_all():
    with pytest.raises(NotFound, match=", ".join(SHORT_NAMES)):
        resolve("x" * 5000)


@pytest.mark.parametrize(
    ("name", "schedule", "error", "says"),
    [
        ("euler", "cosine", NotFound, "karras, exponential, polyexponential, sgm_uniform"),
        ("euler", "lu", InvalidField, "which euler cannot follow"),
        ("ddim", "karras", InvalidField, "it can follow uniform, sgm_uniform, simple, normal, ddim_uniform"),
        ("PLMS", "Align Your Steps", InvalidField, "is align_your_steps, which pndm cannot follow"),
        ("edm_euler", "karras", InvalidField, "it can follow none"),
        ("DPM++ 2M Karras", "exponential", InvalidField, "says karras"),
        ("DPM++ 2M Karras", "normal", InvalidField, "says karras"),
    ],
)
def test_a_noise_schedule_that_cannot_be_followed_is_refused(name, schedule, error, says):
    with pytest.raises(error, match=says) as caught:
        resolve(name, schedule)

    assert caught.value.field == "noise_schedule"
