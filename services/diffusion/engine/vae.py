"""Between images and latents with a checkpoint's VAE: image tensors, tiles where memory is short.

For the device thread, but for what says otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fanlight.errors import FailedPrecondition, NodeFault
from services.diffusion.engine.memory import TILE_SIDE_PX
from services.diffusion.images import Pixels
from services.diffusion.models.device import DeviceOutOfMemory, translate_oom
from services.diffusion.models.model_cache import Checkpoint

Result = TypeVar("Result")
# What the ControlNet `inpaint` reads as a missing pixel.
MISSING = -1.0
# SDXL's `scaling_factor`.
SDXL_SCALING = 0.13025
# Larger images go through the VAE in tiles: it needs some gigabytes for each megapixel.
TILED_ABOVE_PIXELS = 1280 * 1280


class ModelGaveNaN(NodeFault):
    """The model's numbers left the range of its type, so that there is no image in them."""

    reason = "MODEL_GAVE_NAN"


def to_condition(image: Image.Image, mask: Image.Image | None = None) -> Tensor:
    """(1, 3, H, W) in [0, 1] for a ControlNet; -1 where the mask is white, as lllyasviel's inpaint net takes it."""
    pixels = _unit(image)
    return pixels if mask is None else torch.where(to_mask(mask) >= 0.5, torch.tensor(MISSING), pixels)


def to_vae(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1], as a VAE encodes it."""
    return _unit(image) * 2.0 - 1.0


def to_mask(mask: Image.Image) -> Tensor:
    """(1, 1, H, W) in [0, 1], 1 where the mask is white."""
    values = np.asarray(mask.convert("L"), dtype=np.float32) / 255.0
    return torch.from_numpy(values)[None, None]


def _unit(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def require_encoder(checkpoint: Checkpoint) -> None:
    """FailedPrecondition where the VAE's files have the decoder alone."""
    if not checkpoint.can_encode:
        raise FailedPrecondition(f"{checkpoint.entry.id} was fetched without its VAE's encoder", field="image")


def encode(checkpoint: Checkpoint, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Encode RGB pixels (1, 3, H, W) in [-1, 1] to latents (1, C, H/f, W/f), C and f from the VAE's config.

    Drawn from the VAE's distribution and scaled as in diffusers' pipelines (Rombach et al. 2022).
    """
    vae: Any = checkpoint.vae
    own = pixels.to(vae.device, vae.dtype)
    is_large = pixels.shape[-1] * pixels.shape[-2] > TILED_ABOVE_PIXELS
    distribution = _in_tiles_if_needed(vae, is_large, lambda: vae.encode(own).latent_dist)
    encoded = distribution.sample(generator=generator)
    mean, deviation = _latents_statistics(vae, encoded)
    latents: Tensor = (encoded - mean) * vae.config.scaling_factor / deviation
    return latents.to(checkpoint.dtype)


def decode(checkpoint: Checkpoint, latents: Tensor) -> Tensor:
    """Decode latents (1, C, h, w) to RGB pixels (1, 3, H, W), about in [-1, 1].

    In tiles too if the device is out of memory for the whole; DeviceOutOfMemory where tiles do not help.
    """
    vae: Any = checkpoint.vae
    own = latents.to(vae.dtype)
    own = _unscaled(vae, own)
    is_large = own.shape[-1] * own.shape[-2] * checkpoint.entry.shape.latent_factor**2 > TILED_ABOVE_PIXELS
    pixels: Tensor = _in_tiles_if_needed(vae, is_large, lambda: vae.decode(own, return_dict=False)[0])
    return pixels


def decode_image(checkpoint: Checkpoint, latents: Tensor) -> Pixels:
    """Latents (1, C, h, w) to an image (H, W, 3) of uint8. ModelGaveNaN, DeviceOutOfMemory."""
    return _sound_pixels(decode(checkpoint, latents))


def decode_small(checkpoint: Checkpoint, latents: Tensor) -> Pixels:
    """As `decode_image` for latents that are smaller than any tile, and for any thread: the VAE is left as it is."""
    vae: Any = checkpoint.vae
    decoded: Tensor = vae.decode(_unscaled(vae, latents.to(vae.dtype)), return_dict=False)[0]
    return _sound_pixels(decoded)


def _sound_pixels(decoded: Tensor) -> Pixels:
    """From (1, 3, H, W), about in [-1, 1], to (H, W, 3) of uint8. ModelGaveNaN."""
    if not bool(torch.isfinite(decoded).all()):
        raise ModelGaveNaN("the VAE gave NaN; there is no image in it")
    return to_pixels(decoded)


def to_pixels(rgb: Tensor) -> Pixels:
    """From (1, 3, H, W) in about [-1, 1] to (H, W, 3) of uint8."""
    unit = (rgb[0].float() * 0.5 + 0.5).clamp(0, 1)
    pixels: Pixels = (unit * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels


def _in_tiles_if_needed(vae: Any, is_large: bool, work: Callable[[], Result]) -> Result:
    """DeviceOutOfMemory where the device has no memory even for tiles."""
    if not is_large:
        try:
            with translate_oom(), _tiled(vae, False):
                return work()
        except DeviceOutOfMemory:
            torch.cuda.empty_cache()
    with translate_oom(), _tiled(vae, True):
        return work()


@contextmanager
def _tiled(vae: Any, use_tiling: bool) -> Iterator[None]:
    """Tiles overlap and are blended, which does not give the same bits."""
    settings: dict[str, Any] = {"use_tiling": use_tiling}
    if use_tiling:
        side_px = min(vae.config.sample_size, TILE_SIDE_PX)
        settings["tile_sample_min_size"] = side_px
        settings["tile_latent_min_size"] = side_px // 2 ** (len(vae.config.block_out_channels) - 1)
    before = {name: getattr(vae, name) for name in settings}
    vae.__dict__.update(settings)
    try:
        yield
    finally:
        vae.__dict__.update(before)


def usually_scaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents (1, C, h, w) as SDXL's ordinary checkpoints have them, for previews that were fitted to those.

    Playground 2.5's have a mean and a deviation of their own.
    """
    if vae.config.get("latents_mean") is None or vae.config.get("latents_std") is None:
        return latents
    return _unscaled(vae, latents) * SDXL_SCALING


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents (1, C, h, w) as the VAE decodes them."""
    mean, deviation = _latents_statistics(vae, latents)
    unscaled: Tensor = latents * deviation / vae.config.scaling_factor + mean
    return unscaled


def _latents_statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of the latents by channel, (1, C, 1, 1), where the VAE's config has them; else 0 and 1."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return 0.0, 1.0
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(deviation).view(1, -1, 1, 1)
