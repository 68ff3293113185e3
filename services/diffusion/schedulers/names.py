"""The schedulers that a request may name, and which falls of noise each can follow. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.kernel.errors import InvalidField, NotFound

DEFAULT = "ddim"

KARRAS, EXPONENTIAL, SGM_UNIFORM = "karras", "exponential", "sgm_uniform"
# What each sets in a diffusers scheduler, as diffusers' own table of A1111's names says.
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

# By diffusers' class: its module, and which noise schedules it can follow.
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
    """`options` go over the checkpoint's own config; `a1111` is what it is called there, empty where it is not."""

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

_ENDINGS = {f"{space}{schedule.replace('_', space)}": schedule for space in (" ", "_") for schedule in NOISE_SCHEDULES}
_BY_LOWER_CASE = {
    **{name.lower(): name for name in SCHEDULERS},
    **{known.a1111.lower(): name for name, known in SHORT_NAMES.items() if known.a1111},
    # Seen in requests for other services.
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "dpm++ 2s": "dpmpp_2s",
}


def resolve(name: str, noise_schedule: str = "") -> tuple[str, str]:
    """A name of SCHEDULERS and a noise schedule, from any name in any case: `DPM++ 2M Karras`, `euler_a`, a class.

    NotFound, field `scheduler`; InvalidField, field `noise_schedule`, where the two do not go together.
    """
    lower = " ".join(name.lower().split()) or DEFAULT
    base, ending = _BY_LOWER_CASE.get(lower), ""
    for text, schedule in _ENDINGS.items():
        if base is None and lower.endswith(text):
            base, ending = _BY_LOWER_CASE.get(lower.removesuffix(text)), schedule
    if base is None:
        raise NotFound(f"no such scheduler; there are {', '.join(SHORT_NAMES)}", field="scheduler")
    return base, _schedule(base, ending, noise_schedule)


def _schedule(base: str, ending: str, asked: str) -> str:
    asked = "_".join(asked.lower().split())
    if asked and asked not in NOISE_SCHEDULES:
        raise NotFound(f"no such noise schedule; there are {', '.join(NOISE_SCHEDULES)}", field="noise_schedule")
    if asked and ending and asked != ending:
        raise InvalidField(f"is {asked}, and the scheduler's name says {ending}", field="noise_schedule")
    schedule = asked or ending
    can = CLASSES[SCHEDULERS[base].cls][1]
    if schedule and schedule not in can:
        known = ", ".join(can) or "none"
        raise InvalidField(f"is {schedule}, which {base} cannot follow; it can follow {known}", field="noise_schedule")
    return schedule
