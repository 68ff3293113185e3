"""Where a picture begins: pure noise, or a picture with noise on it. For the device thread.

Randomness is drawn in the order of diffusers' pipelines, also where they do not use it: a seed gives their picture.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from services.diffusion.engine.latents import encode
from services.diffusion.generation import Generation, Start
from services.diffusion.models.loading import Checkpoint
from services.diffusion.pictures.tensors import to_mask, to_vae

# Above this mean cosine A1111 takes two noises for one.
_SAME_NOISE_COSINE = 0.9995
# Columns whose angle has a smaller sine are mixed linearly.
_SINE_MIN = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """What inpainting with a usual UNet keeps: after every step the noised original goes where the mask is 0."""

    original: Tensor
    noise: Tensor
    # (1, 1, h, w), 1 is painted anew.
    mask: Tensor

    def put_back(self, latents: Tensor, scheduler: Any, timestep: Tensor | None) -> Tensor:
        """`timestep`: the next one; None after the last step."""
        original = self.original
        if timestep is not None:
            original = scheduler.add_noise(original, self.noise, timestep.reshape(1))
        return (1 - self.mask) * original + self.mask * latents


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Beginning:
    latents: Tensor
    kept: Kept | None = None
    # What a UNet made for inpainting takes beside the latents: mask and masked picture, (1, 5, h, w).
    beside: Tensor | None = None


def first_step(generation: Generation) -> int:
    """How many steps img2img leaves out; at least one is left."""
    if generation.start is None:
        return 0
    count = min(int(generation.steps * generation.start.strength), generation.steps)
    assert count, "the contract refuses a strength that leaves no step"
    return generation.steps - count


def begin(
    generation: Generation, checkpoint: Checkpoint, scheduler: Any, timestep: Tensor, generator: torch.Generator
) -> Beginning:
    """`timestep`: the first one that is evaluated."""
    if generation.start is None:
        noise = _first_noise(generation, checkpoint, generator)
        return Beginning(latents=noise * scheduler.init_noise_sigma)
    if generation.start.mask is None:
        original = encode(checkpoint, to_vae(generation.start.image), generator)
        noise = _first_noise(generation, checkpoint, generator, after_encoding=True)
        return Beginning(latents=scheduler.add_noise(original, noise, timestep.reshape(1)))
    return _inpainting(generation, generation.start, checkpoint, scheduler, timestep, generator)


def _inpainting(
    generation: Generation,
    start: Start,
    checkpoint: Checkpoint,
    scheduler: Any,
    timestep: Tensor,
    generator: torch.Generator,
) -> Beginning:
    assert start.mask is not None
    pixels, mask = to_vae(start.image), to_mask(start.mask)
    is_made_for_it, is_all_noise = _is_inpainting(checkpoint), start.strength == 1.0
    needs_original = not (is_made_for_it and is_all_noise)
    original = encode(checkpoint, pixels, generator) if needs_original else None
    noise = _first_noise(generation, checkpoint, generator, after_encoding=needs_original)
    if is_all_noise:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(original, noise, timestep.reshape(1))
    small = interpolate(mask, size=latents.shape[-2:]).to(latents.device, latents.dtype)
    if is_made_for_it:
        masked = encode(checkpoint, pixels * (mask < 0.5), generator)
        return Beginning(latents=latents, beside=torch.cat([small, masked], dim=1))
    # The pipelines encode the masked picture for every UNet; for this one only the draw remains of it.
    _draw(generation, checkpoint, generator)
    assert original is not None
    return Beginning(latents=latents, kept=Kept(original=original, noise=noise, mask=small))


def _is_inpainting(checkpoint: Checkpoint) -> bool:
    entry = checkpoint.entry
    return entry.unet_channels != entry.shape.latent_channels


def latent_shape(generation: Generation, checkpoint: Checkpoint) -> tuple[int, int, int, int]:
    shape = checkpoint.entry.shape
    factor = shape.latent_factor
    return 1, shape.latent_channels, generation.height_px // factor, generation.width_px // factor


def _first_noise(
    generation: Generation, checkpoint: Checkpoint, generator: torch.Generator, *, after_encoding: bool = False
) -> Tensor:
    """The seed's noise, with the variation seed's mixed in; what is drawn later is the seed's alone, as in A1111.

    `after_encoding`: the generator has drawn an image's latents before. The variation seed's generator draws them too,
    so that at strength 1 the image begins as the variation seed's own.
    """
    noise = _draw(generation, checkpoint, generator)
    if generation.variation_seed is None:
        return noise.to(checkpoint.device)
    other = torch.Generator("cpu").manual_seed(generation.variation_seed)
    if after_encoding:
        torch.randn(latent_shape(generation, checkpoint), generator=other, dtype=checkpoint.vae.dtype)
    mixed = slerp(noise, _draw(generation, checkpoint, other), generation.variation_strength)
    return mixed.to(checkpoint.device)


def slerp(low: Tensor, high: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of noise (1, C, H, W), from `low` at 0 to `high` at 1, with an angle for each column.

    As A1111's modules/rng.py, and like there linear where the two are the same; also for columns of opposite or equal
    directions, where A1111 divides by zero.
    """
    low_, high_ = low.float(), high.float()
    low_unit = low_ / torch.linalg.vector_norm(low_, dim=-2, keepdim=True)
    high_unit = high_ / torch.linalg.vector_norm(high_, dim=-2, keepdim=True)
    cosine = (low_unit * high_unit).sum(-2, keepdim=True)
    linear = torch.lerp(low_, high_, weight)
    if float(cosine.mean()) > _SAME_NOISE_COSINE:
        return linear.to(low.dtype)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    mixed = torch.sin((1 - weight) * angle) / sine * low_ + torch.sin(weight * angle) / sine * high_
    return torch.where(sine > _SINE_MIN, mixed, linear).to(low.dtype)


def _draw(generation: Generation, checkpoint: Checkpoint, generator: torch.Generator) -> Tensor:
    """Noise of the latents' shape from the picture's own CPU generator: a seed means the same on every device."""
    return torch.randn(latent_shape(generation, checkpoint), generator=generator, dtype=checkpoint.dtype)
