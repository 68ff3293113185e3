"""Schedulers from their names and a checkpoint's config. A scheduler keeps state: one picture, one scheduler."""

from collections.abc import Mapping
from typing import Any

import torch

from fanlight.contract.schedulers import CLASSES, NOISE_SCHEDULES, SCHEDULERS
from services.diffusion.generation import Generation
from services.diffusion.schedulers.brownian import BrownianNoise
from services.diffusion.schedulers.classes import scheduler_class


def base_config(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the checkpoint's own scheduler, with its class's defaults filled in where the class is known."""
    name = saved.get("_class_name", "")
    if name not in CLASSES:
        return saved
    config: Mapping[str, Any] = scheduler_class(name).from_config(dict(saved)).config
    return config


def make_scheduler(
    generation: Generation,
    config: Mapping[str, Any],
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A fresh scheduler, set to the generation's steps; its prediction type and noise are the checkpoint's.

    `shape`: of the latents.
    """
    known = SCHEDULERS[generation.scheduler]
    schedule = NOISE_SCHEDULES.get(generation.noise_schedule, {})
    scheduler = scheduler_class(known.cls).from_config(config, **{**known.options, **schedule})
    scheduler.set_timesteps(generation.steps, device=device)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = BrownianNoise(seed=generation.seed, shape=shape, dtype=dtype, device=device)
    return scheduler
