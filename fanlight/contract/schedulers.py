"""The schedulers that a request may name, in all spellings, and the noise schedules that each supports. No torch.

Spellings: diffusers' classes, A1111's names and aliases, k-diffusion's functions, ComfyUI's and Civitai's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fanlight.contract.limits import DEFAULT_SCHEDULER
from fanlight.contract.names import near_names
from fanlight.errors import InvalidField, NotFound

KARRAS, EXPONENTIAL, SGM_UNIFORM = "karras", "exponential", "sgm_uniform"
# The options of a diffusers scheduler for each, from diffusers' table of A1111's names.
NOISE_SCHEDULES: Mapping[str, Mapping[str, object]] = {
    KARRAS: {"use_karras_sigmas": True, "use_exponential_sigmas": False},
    EXPONENTIAL: {"use_karras_sigmas": False, "use_exponential_sigmas": True},
    SGM_UNIFORM: {"timestep_spacing": "trailing"},
}

# As A1111 writes them.
SCHEDULE_TITLES = {KARRAS: "Karras", EXPONENTIAL: "Exponential", SGM_UNIFORM: "SGM Uniform"}

_SIGMAS = (KARRAS, EXPONENTIAL)
_ALL = (KARRAS, EXPONENTIAL, SGM_UNIFORM)
_SPACING = (SGM_UNIFORM,)

# By diffusers' class: its module, and the noise schedules that it supports.
CLASSES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "DDIMScheduler": ("scheduling_ddim", _SPACING),
    "DDPMScheduler": ("scheduling_ddpm", _SPACING),
    "PNDMScheduler": ("scheduling_pndm", _SPACING),
    "LMSDiscreteScheduler": ("scheduling_lms_discrete", _ALL),
    "EulerDiscreteScheduler": ("scheduling_euler_discrete", _ALL),
    "EulerAncestralDiscreteScheduler": ("scheduling_euler_ancestral_discrete", _SPACING),
    "HeunDiscreteScheduler": ("scheduling_heun_discrete", _ALL),
    "DPMSolverMultistepScheduler": ("scheduling_dpmsolver_multistep", _ALL),
    "DPMSolverSinglestepScheduler": ("scheduling_dpmsolver_singlestep", _SIGMAS),
    "DPMSolverSDEScheduler": ("scheduling_dpmsolver_sde", _ALL),
    "KDPM2DiscreteScheduler": ("scheduling_k_dpm_2_discrete", _ALL),
    "KDPM2AncestralDiscreteScheduler": ("scheduling_k_dpm_2_ancestral_discrete", _ALL),
    "DEISMultistepScheduler": ("scheduling_deis_multistep", _ALL),
    "UniPCMultistepScheduler": ("scheduling_unipc_multistep", _ALL),
    "EDMEulerScheduler": ("scheduling_edm_euler", ()),
    "LCMScheduler": ("scheduling_lcm", _SPACING),
    "TCDScheduler": ("scheduling_tcd", _SPACING),
    "SASolverScheduler": ("scheduling_sasolver", _ALL),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerName:
    """`options` override the checkpoint's scheduler config; `a1111` is its name there, empty where it has none."""

    cls: str
    a1111: str = ""
    options: Mapping[str, object] = field(default_factory=dict)


def _name(cls: str, a1111: str = "", **options: object) -> SchedulerName:
    return SchedulerName(cls=cls, a1111=a1111, options=options)


_SDE = "sde-dpmsolver++"

SHORT_NAMES: Mapping[str, SchedulerName] = {
    "ddim": _name("DDIMScheduler", "DDIM"),
    "ddpm": _name("DDPMScheduler", "DDPM"),
    "pndm": _name("PNDMScheduler", "PLMS", skip_prk_steps=True),
    "lms": _name("LMSDiscreteScheduler", "LMS"),
    "euler": _name("EulerDiscreteScheduler", "Euler"),
    "euler_a": _name("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": _name("HeunDiscreteScheduler", "Heun"),
    "dpm2": _name("KDPM2DiscreteScheduler", "DPM2"),
    "dpm2_a": _name("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpmpp_2s": _name("DPMSolverSinglestepScheduler", "DPM++ 2S a"),
    "dpmpp_2m": _name("DPMSolverMultistepScheduler", "DPM++ 2M", use_karras_sigmas=False),
    "dpmpp_2m_sde": _name("DPMSolverMultistepScheduler", "DPM++ 2M SDE", algorithm_type=_SDE),
    "dpmpp_2m_sde_heun": _name(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE Heun", algorithm_type=_SDE, solver_type="heun"
    ),
    "dpmpp_3m_sde": _name("DPMSolverMultistepScheduler", "DPM++ 3M SDE", algorithm_type=_SDE, solver_order=3),
    "dpmpp_sde": _name("DPMSolverSDEScheduler", "DPM++ SDE"),
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
# Noise schedules by their keys; empty: the scheduler's own, as ComfyUI and A1111 call it.
_SCHEDULE_KEYS: Mapping[str, str] = {
    "karras": KARRAS,
    "exponential": EXPONENTIAL,
    "sgmuniform": SGM_UNIFORM,
    "normal": "",
    "automatic": "",
}
# What a scheduler's name may end with.
_ENDINGS = ("karras", "exponential", "sgmuniform", "normal")


def _key(name: str) -> str:
    """`dpmpp2m` of `DPM++ 2M`, `dpmpp_2m`, `k_dpmpp_2m` and `sample_dpmpp_2m`: case, spaces and dashes do not count."""
    lower = re.sub(r"^(k_|k-|sample_)", "", name.strip().lower())
    return re.sub(r"[\s_-]+", "", lower.replace("++", "pp"))


_BY_KEY: Mapping[str, str] = {
    **{_key(known.a1111): name for name, known in SHORT_NAMES.items() if known.a1111},
    **{_key(name): name for name in SCHEDULERS},
    **_OTHER_SPELLINGS,
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


def _split(key: str) -> tuple[str, str]:
    """The scheduler, empty where there is none, and the key of the schedule behind its name."""
    if key in _BY_KEY:
        return _BY_KEY[key], ""
    ending = next((each for each in _ENDINGS if key.endswith(each)), "")
    return _BY_KEY.get(key.removesuffix(ending), ""), ending


def _schedule(base: str, ending: str, requested: str) -> str:
    key = _key(requested)
    if key and key not in _SCHEDULE_KEYS:
        raise NotFound(
            f"there is no noise schedule {requested[:80]!r}; there are {', '.join(NOISE_SCHEDULES)}",
            field="noise_schedule",
        )
    if key and ending and key not in ("automatic", ending):
        raise InvalidField(f"is {requested[:80]}, and the scheduler's name says {ending}", field="noise_schedule")
    schedule = _SCHEDULE_KEYS.get(key, "") or _SCHEDULE_KEYS.get(ending, "")
    can = CLASSES[SCHEDULERS[base].cls][1]
    if schedule and schedule not in can:
        known = ", ".join(can) or "none"
        raise InvalidField(f"is {schedule}, which {base} cannot follow; it can follow {known}", field="noise_schedule")
    return schedule


def _near(name: str) -> str:
    near = near_names(name, [*SCHEDULERS, *(each.a1111 for each in SHORT_NAMES.values() if each.a1111)])
    return f"near it: {', '.join(near)}" if near else f"there are {', '.join(SHORT_NAMES)}"
