"""Previews: small copies of latents, which the device thread takes, and images of them, which any other thread makes.

A preview is best effort: what keeps it from being made costs no image.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from services.diffusion.engine.row import Row
from services.diffusion.engine.vae import ModelGaveNaN, decode_small, to_pixels, usually_scaled
from services.diffusion.images import Pixels, encode_png
from services.diffusion.models.device import DeviceOutOfMemory, translate_oom
from services.diffusion.models.faults import CONTENT_ERRORS
from services.diffusion.models.model_cache import Checkpoint

# A preview's longest side: its PNG then has less than 64 KiB, whatever it shows.
PREVIEW_SIDE_PX = 128

# By checkpoint base, what each latent channel adds to red, green and blue, in [-1, 1]: a preview almost for free.
# Fitted by others to the latents of these VAEs: for SD by keturn, for SDXL by Timothy Alexis Vass.
_TO_RGB = {
    "sd1": ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)),
    "sdxl": ((0.470, 0.470, 0.470), (-0.470, -0.039, 0.078), (0.196, 0.118, -0.039), (-0.549, -0.392, -0.275)),
}
_TO_RGB_OFFSET = {"sd1": (0.0, 0.0, 0.0), "sdxl": (0.176, 0.098, 0.020)}
_LIKE = {"sd2": "sd1", "refiner": "sdxl"}


class LatentPreview:
    """A preview that is not decoded yet; keeps its checkpoint in memory. Made on the device thread."""

    def __init__(self, checkpoint: Checkpoint, latents: Tensor) -> None:
        """`latents`: (1, C, h, w) of a running image; a small copy is taken. DeviceOutOfMemory."""
        self._checkpoint = checkpoint
        factor = checkpoint.entry.shape.latent_factor if _to_rgb_of(checkpoint) is None else 1
        with translate_oom():
            self._small = _small(latents, factor).detach().to("cpu", torch.float32, copy=True)

    @torch.inference_mode()
    def encode(self) -> bytes:
        """A PNG; empty where there is no image in the latents, or none can be made of them. For any other thread."""
        try:
            with translate_oom():
                return encode_png(self.pixels())
        except (DeviceOutOfMemory, ModelGaveNaN, *CONTENT_ERRORS):
            return b""

    @torch.inference_mode()
    def pixels(self) -> Pixels:
        """(h, w, 3) of uint8, decoded as cheaply as possible.

        With a TAESD where there is one, else with a linear map from latents to RGB, else with the VAE.
        """
        tiny, known = self._checkpoint.tiny_vae, _to_rgb_of(self._checkpoint)
        usual = usually_scaled(self._checkpoint.vae, self._small)
        if tiny is not None:
            return to_pixels(tiny.decode(usual.to(tiny.device, tiny.dtype)).sample)
        if known is None:
            return decode_small(self._checkpoint, self._small.to(self._checkpoint.device))
        to_rgb, offset = self._small.new_tensor(_TO_RGB[known]), self._small.new_tensor(_TO_RGB_OFFSET[known])
        return to_pixels(torch.einsum("bchw,cr->brhw", usual, to_rgb) + offset.view(1, 3, 1, 1))


def due_preview(row: Row) -> LatentPreview | None:
    """The preview that the row's latest step asks for; None after its last one, whose image follows. Never raises."""
    every = row.generation.preview_every_steps
    if not every or row.index % every or row.is_finished:
        return None
    try:
        return LatentPreview(row.checkpoint, row.predicted_original)
    except DeviceOutOfMemory:
        return None


def _to_rgb_of(checkpoint: Checkpoint) -> str | None:
    """The linear map that its previews are made with; None where they are decoded by a network."""
    base = _LIKE.get(checkpoint.entry.base, checkpoint.entry.base)
    return base if checkpoint.tiny_vae is None and base in _TO_RGB else None


def _small(latents: Tensor, factor: int) -> Tensor:
    """Latents (1, C, h, w), scaled so that `factor` pixels for each make a preview's size at most."""
    sides = latents.shape[-2:]
    scale = PREVIEW_SIDE_PX / (max(sides) * factor)
    if scale >= 1:
        return latents
    return interpolate(latents, size=[max(1, int(side * scale)) for side in sides], mode="area")
