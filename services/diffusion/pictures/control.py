"""Control images for ControlNets."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_condition(image: Image.Image) -> Tensor:
    """RGB pixels as (1, 3, H, W) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
