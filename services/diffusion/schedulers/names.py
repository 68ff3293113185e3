"""The schedulers that a request may name. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerName:
    """`module` is diffusers'; `options` go over the checkpoint's own config."""

    module: str
    cls: str
    options: Mapping[str, object] = field(default_factory=dict)


DEFAULT = "ddim"

# Classes that take a Stable Diffusion's config. Left out: LMSDiscreteScheduler and DPMSolverSDEScheduler, which need
# scipy and torchsde; EDMEulerScheduler, whose noise is another.
_MODULES = {
    "DDIMScheduler": "scheduling_ddim",
    "DDPMScheduler": "scheduling_ddpm",
    "PNDMScheduler": "scheduling_pndm",
    "EulerDiscreteScheduler": "scheduling_euler_discrete",
    "EulerAncestralDiscreteScheduler": "scheduling_euler_ancestral_discrete",
    "HeunDiscreteScheduler": "scheduling_heun_discrete",
    "DPMSolverMultistepScheduler": "scheduling_dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "scheduling_dpmsolver_singlestep",
    "KDPM2DiscreteScheduler": "scheduling_k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "scheduling_k_dpm_2_ancestral_discrete",
    "DEISMultistepScheduler": "scheduling_deis_multistep",
    "UniPCMultistepScheduler": "scheduling_unipc_multistep",
}


def _name(cls: str, **options: object) -> SchedulerName:
    return SchedulerName(module=f"diffusers.schedulers.{_MODULES[cls]}", cls=cls, options=options)


SCHEDULERS: Mapping[str, SchedulerName] = {
    "ddim": _name("DDIMScheduler"),
    "euler": _name("EulerDiscreteScheduler"),
    "euler_a": _name("EulerAncestralDiscreteScheduler"),
    "dpmpp_2m": _name("DPMSolverMultistepScheduler", use_karras_sigmas=False),
    "dpmpp_2m_karras": _name("DPMSolverMultistepScheduler", use_karras_sigmas=True),
    **{cls: _name(cls) for cls in _MODULES},
}
