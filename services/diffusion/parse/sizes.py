"""The size that is painted."""

import math

from fanlight.errors import InvalidField, TooLarge
from services.diffusion.models.entries import CheckpointEntry


def size_step_px(checkpoint: CheckpointEntry) -> int:
    """Sides must be whole latents; how often the UNet halves them does not matter."""
    return checkpoint.shape.latent_factor


def asked_size(width_px: int, height_px: int, checkpoint: CheckpointEntry, pixels_limit: int) -> tuple[int, int]:
    step_px = size_step_px(checkpoint)
    for field, size_px in (("width_px", width_px), ("height_px", height_px)):
        if not size_px or size_px % step_px:
            raise InvalidField(f"is {size_px}; must be a multiple of {step_px}, or both 0", field=field)
    if width_px * height_px > pixels_limit:
        raise TooLarge(
            f"{width_px} x {height_px} are more than the {pixels_limit} pixels painted here", field="width_px"
        )
    return width_px, height_px


def size_of_picture(size_px: tuple[int, int], checkpoint: CheckpointEntry, pixels_limit: int) -> tuple[int, int]:
    """A picture's own size, scaled down to what is painted here; what is no whole latent is cut off."""
    step_px = size_step_px(checkpoint)
    scale = min(1.0, math.sqrt(pixels_limit / (size_px[0] * size_px[1])))
    width_px, height_px = (max(step_px, int(side * scale) // step_px * step_px) for side in size_px)
    return asked_size(width_px, height_px, checkpoint, pixels_limit)
