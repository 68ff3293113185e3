"""Between pixels and latents with a checkpoint's VAE. For the device thread."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from fanlight.errors import FailedPrecondition
from services.diffusion.models.loading import Checkpoint
from services.diffusion.models.marks import TILE_SIDE_PX
from services.diffusion.models.shortage import NoRoom, noticed

Result = TypeVar("Result")

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
    is_large = pixels.shape[-1] * pixels.shape[-2] > TILED_ABOVE_PIXELS
    said = _in_tiles_if_need_be(vae, is_large, lambda: vae.encode(own).latent_dist)
    encoded = said.sample(generator=generator)
    mean, deviation = _statistics(vae, encoded)
    latents: Tensor = (encoded - mean) * vae.config.scaling_factor / deviation
    return latents.to(checkpoint.dtype)


def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """Pixels (1, 3, H, W), about in [-1, 1]. In tiles too where the device has no room for the whole; or NoRoom."""
    vae: Any = checkpoint.vae
    own = latents.to(vae.dtype)
    mean, deviation = _statistics(vae, own)
    own = own * deviation / vae.config.scaling_factor + mean
    is_large = own.shape[-1] * own.shape[-2] * checkpoint.entry.shape.latent_factor**2 > TILED_ABOVE_PIXELS
    pixels: Tensor = _in_tiles_if_need_be(vae, is_large, lambda: vae.decode(own, return_dict=False)[0])
    return pixels


def _in_tiles_if_need_be(vae: Any, is_large: bool, work: Callable[[], Result]) -> Result:
    """NoRoom where the device has none even for tiles."""
    if not is_large:
        try:
            with noticed(), _tiled(vae, False):
                return work()
        except NoRoom:
            torch.cuda.empty_cache()
    with noticed(), _tiled(vae, True):
        return work()


@contextmanager
def _tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Tiles overlap and are blended, which is not bit for bit the same."""
    settings: dict[str, Any] = {"use_tiling": wanted}
    if wanted:
        side_px = min(vae.config.sample_size, TILE_SIDE_PX)
        settings["tile_sample_min_size"] = side_px
        settings["tile_latent_min_size"] = side_px // 2 ** (len(vae.config.block_out_channels) - 1)
    before = {name: getattr(vae, name) for name in settings}
    vae.__dict__.update(settings)
    try:
        yield
    finally:
        vae.__dict__.update(before)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of the latents, by channel, where the VAE's config has them."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return 0.0, 1.0
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(deviation).view(1, -1, 1, 1)
