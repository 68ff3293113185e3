"""From latents to pixels with the checkpoint's VAE. For the device thread."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from services.diffusion.engine.rows import Row
from services.diffusion.models.loading import Checkpoint
from services.diffusion.pictures.png import Pixels
from services.kernel.errors import NodeFault, ResourceExhausted

# A preview's longest side: its PNG then has less than 64 KiB, whatever it shows.
PREVIEW_SIDE_PX = 128


class ModelGaveNaN(NodeFault):
    """The model's numbers left the range of its type; there is no picture in them."""

    reason = "MODEL_GAVE_NAN"


def check_sound(row: Row) -> None:
    """ModelGaveNaN instead of a black picture."""
    if not row.is_sound():
        raise ModelGaveNaN(
            f"the model gave NaN at step {row.index} of {row.evaluations}; try another scheduler or size"
        )


def decode(row: Row) -> Pixels:
    """The finished picture, (H, W, 3). ModelGaveNaN, ResourceExhausted."""
    try:
        return _decoded(row.checkpoint, row.latents)
    except torch.OutOfMemoryError as error:
        raise ResourceExhausted("the device has no room to decode this size", field="width_px") from error


def preview(row: Row) -> Pixels:
    """How it looks so far, small: the expected latents, scaled down before they are decoded."""
    latents = row.expected
    longest = max(latents.shape[-2:]) * row.checkpoint.entry.shape.latent_factor
    if longest > PREVIEW_SIDE_PX:
        latents = interpolate(latents, scale_factor=PREVIEW_SIDE_PX / longest, mode="area")
    return _decoded(row.checkpoint, latents)


def _decoded(checkpoint: Checkpoint, latents: Tensor) -> Pixels:
    vae = checkpoint.vae
    scaled = latents.to(checkpoint.dtype) / vae.config.scaling_factor
    decoded: Tensor = vae.decode(scaled, return_dict=False)[0]
    if not bool(torch.isfinite(decoded).all()):
        raise ModelGaveNaN("the VAE gave NaN; there is no picture in it")
    unit = (decoded[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu()
    pixels: Pixels = (unit.numpy() * 255).round().astype("uint8")
    return pixels
