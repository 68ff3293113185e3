"""Between pixels and latents with a checkpoint's VAE. For the device thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from services.diffusion.models.loading import Checkpoint
from services.kernel.errors import FailedPrecondition

# Larger pictures go through the VAE in tiles: it needs some gigabytes for each megapixel.
TILED_ABOVE_PIXELS = 1280 * 1280


def encode(checkpoint: Checkpoint, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Latents of pixels (1, 3, H, W) in [-1, 1], drawn from what the VAE says of them as diffusers' pipelines do.

    FailedPrecondition where the VAE's files have the decoder alone.
    """
    if not checkpoint.can_encode:
        raise FailedPrecondition(f"{checkpoint.entry.id} was fetched without its VAE's encoder", field="image")
    vae: Any = checkpoint.vae
    own = pixels.to(vae.device, vae.dtype)
    with _tiled(vae, pixels.shape[-1] * pixels.shape[-2] > TILED_ABOVE_PIXELS):
        encoded = vae.encode(own).latent_dist.sample(generator=generator)
    mean, deviation = _statistics(vae, encoded)
    latents: Tensor = (encoded - mean) * vae.config.scaling_factor / deviation
    return latents.to(checkpoint.dtype)


def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """Pixels (1, 3, H, W), about in [-1, 1]. In tiles too where the device has no room for the whole."""
    vae: Any = checkpoint.vae
    own = latents.to(vae.dtype)
    mean, deviation = _statistics(vae, own)
    own = own * deviation / vae.config.scaling_factor + mean
    is_large = own.shape[-1] * own.shape[-2] * checkpoint.entry.shape.latent_factor**2 > TILED_ABOVE_PIXELS
    try:
        return _decode(vae, own, in_tiles=is_large)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _decode(vae, own, in_tiles=True)


def _decode(vae: Any, latents: Tensor, *, in_tiles: bool) -> Tensor:
    with _tiled(vae, in_tiles):
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


@contextmanager
def _tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Tiles overlap and are blended, which is not bit for bit the same."""
    before = vae.use_tiling
    vae.use_tiling = wanted
    try:
        yield
    finally:
        vae.use_tiling = before


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of the latents, by channel, where the VAE's config has them."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return 0.0, 1.0
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(deviation).view(1, -1, 1, 1)
