"""The v-prediction loss and the schedule that every later stage shares. Knows no data and no command line."""

import torch
from diffusers import DDIMScheduler
from torch import Tensor

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
SHORT_CAPTION_TOKENS, FULL_CAPTION_TOKENS = 20, 77


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule with v-prediction."""
    return DDIMScheduler(**SCHEDULE)


ALPHAS = scheduler().alphas_cumprod


def stratified_steps(count: int) -> Tensor:
    """One diffusion step from each of `count` equal parts of the schedule, shuffled."""
    return ((torch.randperm(count) + torch.rand(count)) / count * 1000).long().clamp(0, 999)


def noised(latents: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents and the velocity v that the UNet must predict (Salimans and Ho 2022)."""
    signal, spread = (part.sqrt().view(-1, 1, 1, 1) for part in (ALPHAS[steps], 1 - ALPHAS[steps]))
    mixed = (signal * latents + spread * noise).contiguous(memory_format=torch.channels_last)
    return mixed, signal * noise - spread * latents


def velocity_loss(predict, latents: Tensor) -> Tensor:
    """Mean squared error of predict(noisy, steps) against v, at random steps."""
    steps = stratified_steps(len(latents))
    mixed, velocity = noised(latents, torch.randn_like(latents), steps)
    with torch.autocast("cpu", torch.bfloat16):
        made = predict(mixed, steps)
    return (made.float() - velocity).square().mean()
