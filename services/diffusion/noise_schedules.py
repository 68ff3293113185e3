"""Noise schedules that diffusers has no option for, or none without scipy: the noise levels of so many steps.

By A1111's modules/sd_schedulers.py, of version 1.10, and Forge's for Turbo. Knows no scheduler and no torch.

A noise level (sigma) is sqrt((1 - a) / a), a the cumulative product of the alphas. `trained`: those of all training
timesteps, (T,), rising. Every function gives (steps,) float64, falling; the 0 after the last step is the scheduler's.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fanlight.contract import schedulers as names

Sigmas = NDArray[np.float64]
# Below this share of signal a noise level counts as this one: zero terminal SNR has none. As in diffusers.
_ALPHA_MIN = 2.0**-24
# Sabour et al. 2024, Align Your Steps (arXiv 2404.14507); the last level is A1111's.
_AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
# Lee et al. 2024, Beta Sampling is All You Need (arXiv 2407.12173); also diffusers' and A1111's defaults.
_BETA_SHAPE = 0.6


def sigmas_of(alphas_cumprod: Sigmas) -> Sigmas:
    """(T,) in 0 to 1, falling, to the noise levels of all training timesteps."""
    alphas = np.clip(np.asarray(alphas_cumprod, dtype=np.float64), _ALPHA_MIN, None)
    found: Sigmas = np.sqrt((1 - alphas) / alphas)
    return found


def noise_levels(name: str, trained: Sigmas, steps: int, *, is_sdxl: bool, span: Sigmas | None = None) -> Sigmas:
    """`name`: one of the contract's, but `lu`. `span`: levels whose first and last one diffusers takes, if any."""
    if name == names.ALIGN_YOUR_STEPS:
        return _align_your_steps(steps, is_sdxl=is_sdxl)
    ends = trained[::-1] if span is None else span
    high, low = float(ends[0]), float(ends[-1])
    return _SPANNED[name](high, low, steps) if name in _SPANNED else _TRAINED[name](trained, steps)


def timesteps_of(sigmas: Sigmas, trained: Sigmas) -> Sigmas:
    """The timesteps of noise levels, (steps,), fractions included: linear in the logarithm, as k-diffusion has it."""
    found: Sigmas = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
    return found


def whole_timesteps(sigmas: Sigmas, trained: Sigmas) -> NDArray[np.int64]:
    """The nearest whole timesteps, (steps,), each below the one before."""
    wanted = np.rint(timesteps_of(sigmas, trained)).astype(np.int64)
    # Where two levels are nearest to one timestep, the noisier one moves up.
    for place in range(len(wanted) - 2, -1, -1):
        wanted[place] = max(wanted[place], wanted[place + 1] + 1)
    falling: NDArray[np.int64] = np.minimum(wanted, len(trained) - 1 - np.arange(len(wanted)))
    return falling


def _at(trained: Sigmas, timesteps: Sigmas) -> Sigmas:
    """Levels of timesteps with fractions, (steps,)."""
    found: Sigmas = np.exp(np.interp(timesteps, np.arange(len(trained)), np.log(trained)))
    return found


def _evenly(trained: Sigmas, steps: int) -> Sigmas:
    return _at(trained, np.linspace(len(trained) - 1, 0, steps))


def _sgm_uniform(trained: Sigmas, steps: int) -> Sigmas:
    return _at(trained, np.linspace(len(trained) - 1, 0, steps + 1)[:-1])


def _simple(trained: Sigmas, steps: int) -> Sigmas:
    places = [-(1 + int(step * len(trained) / steps)) for step in range(steps)]
    return trained[places]


def _ddim_uniform(trained: Sigmas, steps: int) -> Sigmas:
    """So many as asked for, where A1111 adds one for numbers of steps that do not divide the training timesteps."""
    width = max(len(trained) // steps, 1)
    return trained[np.minimum(1 + np.arange(steps)[::-1] * width, len(trained) - 1)]


def _turbo(trained: Sigmas, steps: int) -> Sigmas:
    timesteps = np.rint(np.arange(steps, 0, -1) * (len(trained) / steps) - 1).astype(int)
    found: Sigmas = trained[np.clip(timesteps, 0, len(trained) - 1)]
    return found


def _exponential(high: float, low: float, steps: int) -> Sigmas:
    found: Sigmas = np.exp(np.linspace(math.log(high), math.log(low), steps))
    return found


def _karras(high: float, low: float, steps: int) -> Sigmas:
    """Karras et al. 2022, with rho 7."""
    ramp = np.linspace(0, 1, steps)
    found: Sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return found


def _kl_optimal(high: float, low: float, steps: int) -> Sigmas:
    """Sabour et al. 2024, for a Gaussian. A1111 ends on `low`; here the last step ends on 0, as those of others."""
    part = np.arange(steps) / steps
    found: Sigmas = np.tan(part * math.atan(low) + (1 - part) * math.atan(high))
    return found


def _beta(high: float, low: float, steps: int) -> Sigmas:
    places = [beta_quantile(1 - part, _BETA_SHAPE) for part in np.linspace(0, 1, steps)]
    return low + np.array(places) * (high - low)


def _align_your_steps(steps: int, *, is_sdxl: bool) -> Sigmas:
    """The paper's levels, interpolated in their logarithm for other numbers of steps than 11."""
    known = np.log(_AYS_SDXL if is_sdxl else _AYS)
    found: Sigmas = np.exp(np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(known)), known))
    return found


_TRAINED: Mapping[str, Callable[[Sigmas, int], Sigmas]] = {
    names.UNIFORM: _evenly,
    names.NORMAL: _evenly,
    names.SGM_UNIFORM: _sgm_uniform,
    names.SIMPLE: _simple,
    names.DDIM_UNIFORM: _ddim_uniform,
    names.TURBO: _turbo,
}
_SPANNED: Mapping[str, Callable[[float, float, int], Sigmas]] = {
    names.KARRAS: _karras,
    names.EXPONENTIAL: _exponential,
    # A1111's rho is 1, with which the two are the same.
    names.POLYEXPONENTIAL: _exponential,
    names.KL_OPTIMAL: _kl_optimal,
    names.BETA: _beta,
}


def beta_quantile(part: float, shape: float) -> float:
    """The quantile of the symmetric beta distribution with both parameters `shape`, 0.5 to 1. `part`: 0 to 1.

    By the substitution x = sin(u)^2 the density is 2 (sin u cos u)^(2 shape - 1); beside 0 it grows as a power of u.
    """
    if part <= 0 or part >= 1:
        return float(part >= 1)
    if part > 0.5:
        return 1 - beta_quantile(1 - part, shape)
    grid, mass = _beta_half(shape)
    return math.sin(float(np.interp(part, mass, grid)) ** (1 / (2 * shape))) ** 2


@cache
def _beta_half(shape: float, points: int = 16_385) -> tuple[Sigmas, Sigmas]:
    """u^(2 shape) for u from 0 to pi / 4, (points,), and the distribution's mass up to each, 0 to 0.5."""
    power = 2 * shape
    grid = np.linspace(0, (math.pi / 4) ** power, points)
    angles = grid[1:] ** (1 / power)
    density = np.concatenate([[1.0], (np.sin(angles) * np.cos(angles) / angles) ** (power - 1)])
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return grid, mass / mass[-1] / 2
