"""The schedulers that a request may name, in all spellings, and the noise schedules that each supports. No torch.

Spellings: diffusers' classes, A1111's names and aliases, k-diffusion's functions, ComfyUI's and Civitai's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fanlight.contract.limits import DEFAULT_SCHEDULER
from fanlight.contract.names import near_names
from fanlight.errors import InvalidField, NotFound

KARRAS, EXPONENTIAL, POLYEXPONENTIAL, SGM_UNIFORM = "karras", "exponential", "polyexponential", "sgm_uniform"
UNIFORM, NORMAL, SIMPLE, DDIM_UNIFORM, TURBO = "uniform", "normal", "simple", "ddim_uniform", "turbo"
BETA, KL_OPTIMAL, ALIGN_YOUR_STEPS, LU = "beta", "kl_optimal", "align_your_steps", "lu"

# As A1111 writes them in modules/sd_schedulers.py; Turbo as Forge does, Lu as diffusers' option is called.
SCHEDULE_TITLES: Mapping[str, str] = {
    UNIFORM: "Uniform",
    KARRAS: "Karras",
    EXPONENTIAL: "Exponential",
    POLYEXPONENTIAL: "Polyexponential",
    SGM_UNIFORM: "SGM Uniform",
    KL_OPTIMAL: "KL Optimal",
    ALIGN_YOUR_STEPS: "Align Your Steps",
    SIMPLE: "Simple",
    NORMAL: "Normal",
    DDIM_UNIFORM: "DDIM",
    BETA: "Beta",
    TURBO: "Turbo",
    LU: "Lu",
}
NOISE_SCHEDULES = tuple(SCHEDULE_TITLES)
# What each sampler of A1111 follows where it is asked for `Automatic` (modules/sd_samplers_kdiffusion.py).
AUTOMATIC = "automatic"

_ANY = tuple(name for name in NOISE_SCHEDULES if name != LU)
# Their steps go down the training timesteps by one width.
_EVEN = (UNIFORM, SGM_UNIFORM, SIMPLE, NORMAL, DDIM_UNIFORM)

# By diffusers' class: its module, and the noise schedules that it supports.
CLASSES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "DDIMScheduler": ("scheduling_ddim", _EVEN),
    "DDPMScheduler": ("scheduling_ddpm", _ANY),
    "PNDMScheduler": ("scheduling_pndm", _EVEN),
    "LMSDiscreteScheduler": ("scheduling_lms_discrete", _ANY),
    "EulerDiscreteScheduler": ("scheduling_euler_discrete", _ANY),
    "EulerAncestralDiscreteScheduler": ("scheduling_euler_ancestral_discrete", _ANY),
    "HeunDiscreteScheduler": ("scheduling_heun_discrete", _ANY),
    "DPMSolverMultistepScheduler": ("scheduling_dpmsolver_multistep", NOISE_SCHEDULES),
    "DPMSolverSinglestepScheduler": ("scheduling_dpmsolver_singlestep", _ANY),
    "DPMSolverSDEScheduler": ("scheduling_dpmsolver_sde", _ANY),
    "KDPM2DiscreteScheduler": ("scheduling_k_dpm_2_discrete", _ANY),
    "KDPM2AncestralDiscreteScheduler": ("scheduling_k_dpm_2_ancestral_discrete", _ANY),
    "DEISMultistepScheduler": ("scheduling_deis_multistep", _ANY),
    "UniPCMultistepScheduler": ("scheduling_unipc_multistep", _ANY),
    "EDMEulerScheduler": ("scheduling_edm_euler", ()),
    "LCMScheduler": ("scheduling_lcm", _ANY),
    "TCDScheduler": ("scheduling_tcd", _ANY),
    "SASolverScheduler": ("scheduling_sasolver", _ANY),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerName:
    """`options` override the checkpoint's scheduler config; `a1111` is its name there, empty where it has none.

    `automatic`: the noise schedule that A1111 means by Automatic for it; empty: the scheduler's own.
    """

    cls: str
    a1111: str = ""
    automatic: str = ""
    options: Mapping[str, object] = field(default_factory=dict)


def _name(cls: str, a1111: str = "", automatic: str = "", **options: object) -> SchedulerName:
    return SchedulerName(cls=cls, a1111=a1111, automatic=automatic, options=options)


_SDE = "sde-dpmsolver++"

SHORT_NAMES: Mapping[str, SchedulerName] = {
    "ddim": _name("DDIMScheduler", "DDIM"),
    "ddpm": _name("DDPMScheduler", "DDPM"),
    "pndm": _name("PNDMScheduler", "PLMS", skip_prk_steps=True),
    "lms": _name("LMSDiscreteScheduler", "LMS", UNIFORM),
    "euler": _name("EulerDiscreteScheduler", "Euler", UNIFORM),
    "euler_a": _name("EulerAncestralDiscreteScheduler", "Euler a", UNIFORM),
    "heun": _name("HeunDiscreteScheduler", "Heun", UNIFORM),
    "dpm2": _name("KDPM2DiscreteScheduler", "DPM2", KARRAS),
    "dpm2_a": _name("KDPM2AncestralDiscreteScheduler", "DPM2 a", KARRAS),
    "dpmpp_2s": _name("DPMSolverSinglestepScheduler", "DPM++ 2S a", KARRAS),
    "dpmpp_2m": _name("DPMSolverMultistepScheduler", "DPM++ 2M", KARRAS, use_karras_sigmas=False),
    "dpmpp_2m_sde": _name("DPMSolverMultistepScheduler", "DPM++ 2M SDE", EXPONENTIAL, algorithm_type=_SDE),
    "dpmpp_2m_sde_heun": _name(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE Heun", EXPONENTIAL, algorithm_type=_SDE, solver_type="heun"
    ),
    "dpmpp_3m_sde": _name(
        "DPMSolverMultistepScheduler", "DPM++ 3M SDE", EXPONENTIAL, algorithm_type=_SDE, solver_order=3
    ),
    "dpmpp_sde": _name("DPMSolverSDEScheduler", "DPM++ SDE", KARRAS),
    "deis": _name("DEISMultistepScheduler", "DEIS"),
    "unipc": _name("UniPCMultistepScheduler", "UniPC"),
    "lcm": _name("LCMScheduler", "LCM"),
    "tcd": _name("TCDScheduler", "TCD"),
    "sa_solver": _name("SASolverScheduler", "SA Solver"),
    "edm_euler": _name("EDMEulerScheduler"),
}

SCHEDULERS: Mapping[str, SchedulerName] = {**SHORT_NAMES, **{cls: _name(cls) for cls in CLASSES}}

# Other spellings as `_key` normalizes them: k-diffusion's, ComfyUI's and Civitai's.
_OTHER_SPELLINGS: Mapping[str, str] = {
    "plms": "pndm",
    "eulerancestral": "euler_a",
    "dpm2ancestral": "dpm2_a",
    "dpmpp2sancestral": "dpmpp_2s",
    "dpmpp2sa": "dpmpp_2s",
    "dpmppsdegpu": "dpmpp_sde",
    "dpmpp2msdegpu": "dpmpp_2m_sde",
    "dpmpp2msdeheungpu": "dpmpp_2m_sde_heun",
    "dpmpp3msdegpu": "dpmpp_3m_sde",
    # diffusers' UniPC is bh2 unless another solver is set.
    "unipcbh2": "unipc",
    # Civitai leaves out the pluses.
    "dpmsde": "dpmpp_sde",
    "dpm2m": "dpmpp_2m",
    "dpm2msde": "dpmpp_2m_sde",
    "dpm2sa": "dpmpp_2s",
    "dpm3msde": "dpmpp_3m_sde",
}


def _key(name: str) -> str:
    """`dpmpp2m` of `DPM++ 2M`, `dpmpp_2m`, `k_dpmpp_2m` and `sample_dpmpp_2m`: case, spaces and dashes do not count."""
    lower = re.sub(r"^(k_|k-|sample_)", "", name.strip().lower())
    return re.sub(r"[\s_-]+", "", lower.replace("++", "pp"))


_BY_KEY: Mapping[str, str] = {
    **{_key(known.a1111): name for name, known in SHORT_NAMES.items() if known.a1111},
    **{_key(name): name for name in SCHEDULERS},
    **_OTHER_SPELLINGS,
}


# Other spellings of noise schedules as `_key` normalizes them: A1111's, ComfyUI's, Forge's and k-diffusion's.
_SCHEDULE_KEYS: Mapping[str, str] = {
    AUTOMATIC: AUTOMATIC,
    **{_key(name): name for name in NOISE_SCHEDULES},
    **{_key(title): name for name, title in SCHEDULE_TITLES.items()},
    "ays": ALIGN_YOUR_STEPS,
}
# What a scheduler's name may end with, the longest first; the short ones are of A1111's aliases, as in `k_lms_ka`.
_ENDINGS: Mapping[str, str] = {
    key: _SCHEDULE_KEYS.get(key) or {"ka": KARRAS, "exp": EXPONENTIAL}[key]
    for key in sorted([*_SCHEDULE_KEYS, "ka", "exp"], key=len, reverse=True)
    if key != "ddim"
}


def resolve(name: str, noise_schedule: str = "") -> tuple[str, str]:
    """A name of SCHEDULERS and a noise schedule, from any spelling: `DPM++ 2M Karras`, `k_euler_a`, a class.

    An empty name means `ddim`, an empty schedule in the answer the scheduler's own. NotFound, field `scheduler` or
    `noise_schedule`, names near ones; InvalidField, field `noise_schedule`, where the scheduler does not support it.
    """
    base, ending = _split(_key(name) if name.strip() else DEFAULT_SCHEDULER)
    if not base:
        raise NotFound(f"there is no scheduler {name[:80]!r}; {_near(name)}", field="scheduler")
    return base, _schedule(base, ending, noise_schedule)


def is_known_to_all(scheduler: str, noise_schedule: str) -> bool:
    """Whether workers of before noise schedules were announced follow it; both as `resolve` gives them."""
    return noise_schedule in _FIRST.get(SCHEDULERS[scheduler].cls, _FIRST_OF_MOST)


# Those workers take `normal` for the scheduler's own.
_FIRST_OF_MOST = ("", NORMAL, KARRAS, EXPONENTIAL, SGM_UNIFORM)
_FIRST: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"), ("", NORMAL, SGM_UNIFORM)
    ),
    "EulerAncestralDiscreteScheduler": ("", NORMAL, SGM_UNIFORM),
    "DPMSolverSinglestepScheduler": ("", NORMAL, KARRAS, EXPONENTIAL),
    "EDMEulerScheduler": ("",),
}


def _split(key: str) -> tuple[str, str]:
    """The scheduler, empty where there is none, and the noise schedule behind its name."""
    if key in _BY_KEY:
        return _BY_KEY[key], ""
    for ending, schedule in _ENDINGS.items():
        if key.endswith(ending) and (base := _BY_KEY.get(key.removesuffix(ending))):
            return base, schedule
    return "", ""


def _schedule(base: str, ending: str, requested: str) -> str:
    key = _key(requested)
    if key and key not in _SCHEDULE_KEYS:
        raise NotFound(
            f"there is no noise schedule {requested[:80]!r}; there are {', '.join((AUTOMATIC, *NOISE_SCHEDULES))}",
            field="noise_schedule",
        )
    schedule = _SCHEDULE_KEYS.get(key, "")
    if schedule and ending and ending not in (AUTOMATIC, schedule) and schedule != AUTOMATIC:
        raise InvalidField(f"is {requested[:80]}, and the scheduler's name says {ending}", field="noise_schedule")
    if not schedule or (schedule == AUTOMATIC and ending):
        schedule = ending
    known = SCHEDULERS[base]
    if schedule == AUTOMATIC:
        return known.automatic
    can = CLASSES[known.cls][1]
    if schedule and schedule not in can:
        follows = ", ".join(can) or "none"
        raise InvalidField(
            f"is {schedule}, which {base} cannot follow; it can follow {follows}", field="noise_schedule"
        )
    return schedule


def _near(name: str) -> str:
    near = near_names(name, [*SCHEDULERS, *(each.a1111 for each in SHORT_NAMES.values() if each.a1111)])
    return f"near it: {', '.join(near)}" if near else f"there are {', '.join(SHORT_NAMES)}"
