"""Pictures as the models take them."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from services.diffusion.pictures.fit import MASK_THRESHOLD

# What the ControlNet `inpaint` reads as a missing pixel.
MISSING = -1.0


def to_condition(image: Image.Image, mask: Image.Image | None = None) -> Tensor:
    """(1, 3, H, W) in [0, 1] for a ControlNet; -1 where the mask is white."""
    pixels = _unit(image)
    return pixels if mask is None else torch.where(to_mask(mask) > 0, torch.tensor(MISSING), pixels)


def to_vae(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1], as a VAE encodes it."""
    return _unit(image) * 2.0 - 1.0


def to_mask(mask: Image.Image) -> Tensor:
    """(1, 1, H, W), 1 where it is white and else 0."""
    white = np.asarray(mask.convert("L")) >= MASK_THRESHOLD
    return torch.from_numpy(white.astype(np.float32))[None, None]


def _unit(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
