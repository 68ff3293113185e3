"""diffusers' schedulers by name and a checkpoint's config. A scheduler keeps state: one image, one scheduler.

Two of diffusers' classes import packages that are not worth their bytes; what those do is done here.
"""

import bisect
import inspect
import math
import sys
import types
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fanlight.contract import schedulers as names
from fanlight.contract.schedulers import CLASSES, SCHEDULERS
from services.diffusion.diffusers_import import import_diffusers_module
from services.diffusion.edm import is_edm, make_edm_scheduler
from services.diffusion.noise_schedules import noise_levels, sigmas_of, timesteps_of, whole_timesteps
from services.diffusion.zero_snr import OPTION, compute_in_float32, with_zero_snr

# Exact for polynomials of degree 7; a linear multistep of order 4 has degree 3.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
# Of a scheduler whose steps are not asked for yet.
_STEPS_OF_NONE = 2


def base_config(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the checkpoint's own scheduler, with its class's defaults filled in where the class is known."""
    name = saved.get("_class_name", "")
    if name not in CLASSES:
        return saved
    config: Mapping[str, Any] = scheduler_class(name).from_config(dict(saved)).config
    return config


def make_scheduler(
    name: str,
    config: Mapping[str, Any],
    *,
    noise_schedule: str,
    steps: int,
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    is_sdxl: bool = False,
) -> Any:
    """A fresh scheduler for so many steps; its prediction type and betas are those of the checkpoint's config.

    `name`, `noise_schedule`: as fanlight.contract.schedulers has them. `shape`: of the latents. `is_sdxl`: Align Your
    Steps has levels of its own for SDXL.
    """
    if is_edm(config):
        return make_edm_scheduler(name, config, noise_schedule=noise_schedule, steps=steps)
    known = SCHEDULERS[name]
    cls = scheduler_class(known.cls)
    has_zero_snr = bool(config.get(OPTION))
    config = with_zero_snr(cls, config)
    option = _option(cls, known.cls, noise_schedule)
    is_followed = option is None and bool(noise_schedule)
    chosen = _CONVERTED if is_followed else option or {}
    scheduler = cls.from_config(config, **{**known.options, **_taken(cls, {**_cleared(noise_schedule), **chosen})})
    if is_followed:
        _follow(scheduler, noise_schedule, steps, is_sdxl=is_sdxl)
    else:
        scheduler.set_timesteps(steps, device="cpu")
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = BrownianNoise(seed=seed, shape=shape, dtype=dtype, device=device)
    if has_zero_snr and dtype is not torch.float32:
        compute_in_float32(scheduler, dtype)
    return scheduler


# Options of diffusers' schedulers by noise schedule: those of its table of A1111's names.
_OPTIONS: Mapping[str, Mapping[str, object]] = {
    names.KARRAS: {"use_karras_sigmas": True},
    names.EXPONENTIAL: {"use_exponential_sigmas": True},
    # A1111's rho is 1, with which the two are the same.
    names.POLYEXPONENTIAL: {"use_exponential_sigmas": True},
    names.SGM_UNIFORM: {"timestep_spacing": "trailing"},
    names.LU: {"use_lu_lambdas": True},
}
# Of the classes whose steps all have one width; `normal` is as the checkpoint's config spaces them.
_EVEN_OPTIONS: Mapping[str, Mapping[str, object]] = {
    names.UNIFORM: {"timestep_spacing": "leading"},
    names.DDIM_UNIFORM: {"timestep_spacing": "leading"},
    names.SGM_UNIFORM: {"timestep_spacing": "trailing"},
    names.SIMPLE: {"timestep_spacing": "trailing"},
    names.NORMAL: {},
}
_EVEN_CLASSES = ("DDIMScheduler", "PNDMScheduler")
# A noise schedule that was asked for takes the place of what the checkpoint's config says.
_OFF = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), False)
# Makes a class convert its levels by `_convert_to_karras`, which then gives ours.
_CONVERTED: Mapping[str, object] = {"use_karras_sigmas": True}


def _cleared(noise_schedule: str) -> Mapping[str, object]:
    return _OFF if noise_schedule else {}


def _option(cls: Any, name: str, noise_schedule: str) -> Mapping[str, object] | None:
    """diffusers' own way to follow it; None where it has none."""
    option = (_EVEN_OPTIONS if name in _EVEN_CLASSES else _OPTIONS).get(noise_schedule)
    if not noise_schedule or option is None:
        return None
    # LCM's and TCD's own timesteps fall as those of SGM Uniform do.
    is_own = noise_schedule == names.SGM_UNIFORM and name in ("LCMScheduler", "TCDScheduler")
    return option if is_own or len(_taken(cls, option)) == len(option) else None


def _taken(cls: Any, options: Mapping[str, object]) -> Mapping[str, object]:
    """Those of the options that the class has."""
    has = _parameters(cls)
    return {option: value for option, value in options.items() if option in has}


@cache
def _parameters(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls.__init__).parameters)


def _follow(scheduler: Any, noise_schedule: str, steps: int, *, is_sdxl: bool) -> None:
    """Set the timesteps by the levels of `noise_levels`."""
    trained = sigmas_of(scheduler.alphas_cumprod.numpy())
    if hasattr(scheduler, "_convert_to_karras"):

        def convert(in_sigmas: Any, num_inference_steps: int = 0) -> Any:
            span = np.asarray(in_sigmas, dtype=np.float64) if noise_schedule == names.BETA else None
            return noise_levels(noise_schedule, trained, steps, is_sdxl=is_sdxl, span=span)

        scheduler._convert_to_karras = convert
        scheduler.set_timesteps(steps, device="cpu")
        return
    scheduler.set_timesteps(steps, device="cpu")
    levels = noise_levels(noise_schedule, trained, steps, is_sdxl=is_sdxl)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))
        scheduler.timesteps = torch.from_numpy(timesteps_of(levels, trained).astype(np.float32))
    else:
        scheduler.custom_timesteps = True
        scheduler.timesteps = torch.from_numpy(whole_timesteps(levels, trained))


@cache
def scheduler_class(name: str) -> Any:
    """`name`: one of CLASSES."""
    if name == "DPMSolverSDEScheduler":
        return _soon_made(_sde_class())
    cls = getattr(import_diffusers_module(f"schedulers.{CLASSES[name][0]}"), name)
    if name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        return _soon_made(cls)
    return _with_own_integral(cls) if name == "LMSDiscreteScheduler" else cls


def _soon_made(base: Any) -> Any:
    """Its `__init__` sets all timesteps of the training, in up to 0.2 s; those that are asked for follow anyway."""

    def set_timesteps(
        self: Any, num_inference_steps: int, device: Any = None, num_train_timesteps: int | None = None
    ) -> None:
        steps = num_inference_steps if num_train_timesteps is None else _STEPS_OF_NONE
        base.set_timesteps(self, steps, device, num_train_timesteps)

    return type(base.__name__, (base,), {"set_timesteps": set_timesteps})


def _sde_class() -> Any:
    """Its module imports torchsde, and scipy with it, for the noise that BrownianNoise makes."""
    is_missing = "torchsde" not in sys.modules
    if is_missing:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return import_diffusers_module("schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    finally:
        if is_missing:
            del sys.modules["torchsde"]


def _with_own_integral(base: Any) -> Any:
    """LMS integrates polynomials with scipy; four Gauss points do it exactly."""

    class LMSDiscreteScheduler(base):  # type: ignore[misc]  # a class that is only known when it is imported
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            low, high = float(self.sigmas[t]), float(self.sigmas[t + 1])
            at = (high - low) / 2 * _NODES + (high + low) / 2
            product = np.ones_like(at)
            for other in set(range(order)) - {current_order}:
                sigma, own = float(self.sigmas[t - other]), float(self.sigmas[t - current_order])
                product *= (at - sigma) / (own - sigma)
            return float((high - low) / 2 * (product * _WEIGHTS).sum())

    return LMSDiscreteScheduler


class BrownianNoise:
    """`noise(sigma, next_sigma)` is a Brownian path's increment between the two, scaled to a deviation of 1.

    Two steps over the same stretch of the path agree, as with torchsde's BrownianTree in k-diffusion. The path is
    drawn where it is evaluated, from its own CPU generator: same seed and calls, same noise.
    """

    def __init__(self, *, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """`shape`: of the latents."""
        # Another stream than the one that the first latents come from.
        self._generator = torch.Generator("cpu").manual_seed((seed + 1) % 2**63)
        self._shape, self._dtype, self._device = shape, dtype, device
        # Known places of the path in order, and its values there.
        self._times: list[float] = []
        self._values: list[Tensor] = []

    def __call__(self, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
        """Noise of the latents' shape, such as (1, C, h, w). `sigma`, `next_sigma`: scalars, different, 0 or more."""
        start, end = float(sigma), float(next_sigma)
        noise = (self._at(end) - self._at(start)) / math.sqrt(abs(end - start))
        return noise.to(self._device, self._dtype)

    def _at(self, time: float) -> Tensor:
        place = bisect.bisect_left(self._times, time)
        if place == len(self._times) or self._times[place] != time:
            self._values.insert(place, self._new(time, place))
            self._times.insert(place, time)
        return self._values[place]

    def _new(self, time: float, place: int) -> Tensor:
        """Free beyond the known places; between two of them a Brownian bridge."""
        if not self._times:
            return torch.zeros(self._shape)
        if place == 0:
            return self._values[0] + self._normal() * math.sqrt(self._times[0] - time)
        if place == len(self._times):
            return self._values[-1] + self._normal() * math.sqrt(time - self._times[-1])
        low, high = self._times[place - 1], self._times[place]
        part = (time - low) / (high - low)
        middle = torch.lerp(self._values[place - 1], self._values[place], part)
        return middle + self._normal() * math.sqrt(part * (1 - part) * (high - low))

    def _normal(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator)
