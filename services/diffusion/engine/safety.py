"""The safety checker that came with Stable Diffusion, loaded when a picture asks for it, held as other models are.

For the device thread.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from fanlight.errors import FailedPrecondition, NodeFault
from services.diffusion.generation import Safety
from services.diffusion.models.library import Library
from services.diffusion.models.recipes import UnfitFolder
from services.diffusion.models.safety_net import load_safety_net
from services.diffusion.models.shortage import is_shortage
from services.diffusion.pictures.png import Pixels
from services.weights.tensors import BadHeader

# As CLIP's own preprocessing: size, and mean and deviation of its pixels by channel.
_SIDE_PX = 224
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# A picture is blurred by this part of its longer side.
_BLUR = 1 / 16

_DAMAGE = (OSError, ValueError, TypeError, KeyError, RuntimeError, BadHeader, FailedPrecondition, UnfitFolder)


class SafetyChecker:
    def __init__(self, folder: Path | None) -> None:
        """`folder`: in diffusers' layout, with safetensors."""
        self._folder = folder

    def checked(self, pixels: Pixels, mode: Safety, library: Library) -> tuple[Pixels, bool]:
        """The picture as the mode wants it, and whether it is unsafe. NodeFault where the checker cannot be loaded."""
        with library.holding("safety_checker", lambda dtype: _load(self._folder, dtype)) as model:
            is_unsafe = _is_unsafe(pixels, model)
        return (_hidden(pixels, mode) if is_unsafe else pixels), is_unsafe


def _is_unsafe(pixels: Pixels, model: Any) -> bool:
    looked_at = _clip_input(pixels).to(model.concept_embeds.device, model.concept_embeds.dtype)
    is_unsafe: bool = model(looked_at)
    return is_unsafe


def _load(folder: Path | None, dtype: torch.dtype) -> Any:
    if folder is None:
        raise NodeFault("this worker has no safety checker")
    try:
        return load_safety_net(folder, dtype)
    except _DAMAGE as error:
        if is_shortage(error):
            raise
        raise NodeFault("the safety checker cannot be loaded: a file is missing or damaged") from error


def _clip_input(pixels: Pixels) -> Tensor:
    """(1, 3, 224, 224): the shorter side scaled down, the middle cut out, normalised."""
    image = Image.fromarray(pixels)
    scale = _SIDE_PX / min(image.size)
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - _SIDE_PX) // 2, (scaled.height - _SIDE_PX) // 2
    cut = scaled.crop((left, top, left + _SIDE_PX, top + _SIDE_PX))
    unit = torch.from_numpy(np.asarray(cut, dtype=np.float32) / 255.0)
    return ((unit - torch.tensor(_MEAN)) / torch.tensor(_DEVIATION)).permute(2, 0, 1)[None]


def _hidden(pixels: Pixels, mode: Safety) -> Pixels:
    if mode is Safety.BLOCK:
        return np.zeros_like(pixels)
    if mode is Safety.BLUR:
        radius = max(pixels.shape[:2]) * _BLUR
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    return pixels
