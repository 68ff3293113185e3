"""Schedulers of checkpoints in the formulation of Karras et al. 2022 (EDM): Playground 2.5, CosXL.

Their noise levels are continuous, so that only diffusers' EDM classes fit them; the usual names mean those here.
"""

from collections.abc import Mapping
from typing import Any

from fanlight.contract.schedulers import SCHEDULERS
from fanlight.errors import InvalidField
from services.diffusion.diffusers_import import import_diffusers_module

_EULER, _MULTISTEP = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
_MODULES = {_EULER: "scheduling_edm_euler", _MULTISTEP: "scheduling_edm_dpmsolver_multistep"}
# DDIM without noise of its own is Euler's method in these levels, as ComfyUI samples it.
_MEANT = {
    _EULER: _EULER,
    "EulerDiscreteScheduler": _EULER,
    "DDIMScheduler": _EULER,
    "DPMSolverMultistepScheduler": _MULTISTEP,
}
_NAMES = "euler, ddim, dpmpp_2m, dpmpp_2m_sde"
# diffusers' class has no third order for what draws noise in every step.
_ORDER_LIMIT = 2
_SCHEDULES = {"karras": "karras", "exponential": "exponential", "polyexponential": "exponential"}
_OWN_SCHEDULE = ("", "normal", "automatic")
# What the classes take of a checkpoint's config and of a name's options.
_KEPT = ("prediction_type", "rho", "sigma_data", "sigma_max", "sigma_min", "sigma_schedule")
_OPTIONS = ("algorithm_type", "solver_order", "solver_type")


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's scheduler config is of this formulation."""
    return config.get("_class_name") in _MODULES


def make_edm_scheduler(name: str, config: Mapping[str, Any], *, noise_schedule: str, steps: int) -> Any:
    """A fresh scheduler for so many steps. InvalidField where the name or the schedule means none of this kind."""
    known = SCHEDULERS[name]
    meant = _MEANT.get(known.cls)
    if meant is None or known.options.get("solver_order", _ORDER_LIMIT) != _ORDER_LIMIT:
        raise InvalidField(
            f"is {name}, and the checkpoint is of the EDM kind; it can follow {_NAMES}", field="scheduler"
        )
    if noise_schedule not in _SCHEDULES and noise_schedule not in _OWN_SCHEDULE:
        raise InvalidField(
            f"is {noise_schedule}, and a checkpoint of the EDM kind can follow karras and exponential",
            field="noise_schedule",
        )
    options = {key: config[key] for key in _KEPT if key in config}
    if noise_schedule in _SCHEDULES:
        options["sigma_schedule"] = _SCHEDULES[noise_schedule]
    if meant == _MULTISTEP:
        options |= {key: value for key, value in known.options.items() if key in _OPTIONS}
    scheduler = getattr(import_diffusers_module(f"schedulers.{_MODULES[meant]}"), meant)(**options)
    scheduler.set_timesteps(steps, device="cpu")
    return scheduler
