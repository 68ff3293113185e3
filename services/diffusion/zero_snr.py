"""Zero terminal SNR (Lin et al. 2024, arXiv 2305.08891) for every scheduler, also those that diffusers has without it.

A class without the option would pass it over in silence, and start from noise that the checkpoint never saw.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, wraps
from typing import Any

import torch

from services.diffusion.diffusers_import import import_diffusers_module

OPTION = "rescale_betas_zero_snr"
# How much signal is left at the last step where a class divides by it: diffusers' number for Euler, 4096 times more
# noise. ComfyUI and A1111 take about the same.
LAST_SIGNAL = 2.0**-24
# What the betas follow from, besides those that a config may have itself.
_BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
# For so many configs the betas are cached.
_CACHED = 32


def with_zero_snr(cls: Any, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's config for this class: with the rescaled betas where the class would not rescale them."""
    if not config.get(OPTION) or _rescales(cls):
        return config
    given = config.get("trained_betas")
    key = tuple((name, config[name]) for name in _BETAS if name in config)
    betas = _rescaled(key, None if given is None else tuple(given))
    return {**config, OPTION: False, "trained_betas": list(betas)}


@cache
def _rescales(cls: Any) -> bool:
    return OPTION in inspect.signature(cls.__init__).parameters


@lru_cache(_CACHED)
def _rescaled(key: tuple[tuple[str, Any], ...], given: tuple[float, ...] | None) -> tuple[float, ...]:
    """diffusers' own rescaled betas, with a rest of signal at the end."""
    ddim = import_diffusers_module("schedulers.scheduling_ddim").DDIMScheduler
    made = ddim(**dict(key), trained_betas=None if given is None else list(given), **{OPTION: True})
    signal = made.alphas_cumprod.double().clone()
    signal[-1] = LAST_SIGNAL
    before = torch.cat([torch.ones(1, dtype=signal.dtype), signal[:-1]])
    betas: list[float] = (1 - signal / before).tolist()
    return tuple(betas)


def compute_in_float32(scheduler: Any, dtype: torch.dtype) -> None:
    """Makes a scheduler compute latents, (1, C, h, w), in float32, and give the model its input in `dtype`.

    In half precision the noise of the first step, 4096 times the image, drowns it: the steps' results are differences.
    """
    step: Callable[..., Any] = scheduler.step
    scale: Callable[..., Any] = scheduler.scale_model_input

    @wraps(step)
    def wide_step(model_output: Any, timestep: Any, sample: Any, *arguments: Any, **options: Any) -> Any:
        return step(model_output.float(), timestep, sample.float(), *arguments, **options)

    @wraps(scale)
    def wide_scale(sample: Any, *arguments: Any, **options: Any) -> Any:
        return scale(sample.float(), *arguments, **options).to(dtype)

    scheduler.step, scheduler.scale_model_input = wide_step, wide_scale
