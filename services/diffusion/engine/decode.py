"""From latents to pixels with the checkpoint's VAE. For the device thread."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fanlight.errors import NodeFault
from services.diffusion.engine import latents as vae
from services.diffusion.engine.rows import Row
from services.diffusion.models.loading import Checkpoint
from services.diffusion.pictures.png import Pixels

# A preview's longest side: its PNG then has less than 64 KiB, whatever it shows.
PREVIEW_SIDE_PX = 128

# By checkpoint base, what each latent channel adds to red, green and blue, in [-1, 1]: a picture for next to nothing.
# Fitted by others to the latents of these VAEs: for SD keturn, for SDXL Timothy Alexis Vass.
_TO_RGB = {
    "sd1": ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)),
    "sdxl": ((0.470, 0.470, 0.470), (-0.470, -0.039, 0.078), (0.196, 0.118, -0.039), (-0.549, -0.392, -0.275)),
}
_TO_RGB_OFFSET = {"sd1": (0.0, 0.0, 0.0), "sdxl": (0.176, 0.098, 0.020)}
_LIKE = {"sd2": "sd1", "refiner": "sdxl"}


class ModelGaveNaN(NodeFault):
    """The model's numbers left the range of its type; there is no picture in them."""

    reason = "MODEL_GAVE_NAN"


def gave_nan(row: Row) -> ModelGaveNaN:
    """Instead of a black picture."""
    return ModelGaveNaN(f"the model gave NaN at step {row.index} of {row.evaluations}; try another scheduler or size")


def are_sound(rows: Sequence[Row]) -> list[bool]:
    """Whether all numbers of each are finite; the device is waited for once, not once a row."""
    if not rows:
        return []
    sound: list[bool] = torch.stack([torch.isfinite(row.latents).all() for row in rows]).tolist()
    return sound


def decode(row: Row) -> Pixels:
    """The finished picture, (H, W, 3). ModelGaveNaN, NoRoom."""
    return _decoded(row.checkpoint, row.latents)


def preview(row: Row) -> Pixels:
    """How it looks so far, small: the expected latents scaled down, then decoded as cheaply as can be."""
    tiny, base = row.checkpoint.tiny_vae, row.checkpoint.entry.base
    if tiny is not None:
        return _to_pixels(tiny.decode(_small(row, row.checkpoint.entry.shape.latent_factor).to(tiny.dtype)).sample)
    if (known := _LIKE.get(base, base)) in _TO_RGB:
        latents = _small(row, 1)
        to_rgb, offset = latents.new_tensor(_TO_RGB[known]), latents.new_tensor(_TO_RGB_OFFSET[known])
        return _to_pixels(torch.einsum("bchw,cr->brhw", latents, to_rgb) + offset.view(1, 3, 1, 1))
    return _decoded(row.checkpoint, _small(row, row.checkpoint.entry.shape.latent_factor))


def _small(row: Row, factor: int) -> Tensor:
    """The expected latents, so scaled that `factor` pixels for each of them make a preview's size at most."""
    sides = row.expected.shape[-2:]
    scale = PREVIEW_SIDE_PX / (max(sides) * factor)
    if scale >= 1:
        return row.expected
    return interpolate(row.expected, size=[max(1, int(side * scale)) for side in sides], mode="area")


def _decoded(checkpoint: Checkpoint, latents: Tensor) -> Pixels:
    decoded = vae.decode(checkpoint, latents)
    if not bool(torch.isfinite(decoded).all()):
        raise ModelGaveNaN("the VAE gave NaN; there is no picture in it")
    return _to_pixels(decoded)


def _to_pixels(rgb: Tensor) -> Pixels:
    """From (1, 3, H, W) in about [-1, 1]."""
    unit = (rgb[0].float() * 0.5 + 0.5).clamp(0, 1)
    pixels: Pixels = (unit * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels
