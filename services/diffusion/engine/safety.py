"""The safety checker that came with Stable Diffusion, loaded when first needed and cached as other models are.

For the device thread.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from fanlight.errors import FailedPrecondition, NodeFault
from services.diffusion.engine.generation import Safety
from services.diffusion.images import Pixels
from services.diffusion.models.clip import ClipConfig, SafetyNet
from services.diffusion.models.device import is_out_of_memory
from services.diffusion.models.loading import LoadTarget, build_empty, fill_module, folder_tensors
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.models.recipes import UnfitFolder, read_json
from services.weights.references.tensors import BadHeader

# CLIP's preprocessing: size, and mean and deviation of its pixels by channel.
_SIDE_PX = 224
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# The radius of the blur, as a part of the image's longer side.
_BLUR = 1 / 16
_DAMAGE = (OSError, ValueError, TypeError, KeyError, RuntimeError, BadHeader, FailedPrecondition, UnfitFolder)


class SafetyChecker:
    def __init__(self, folder: Callable[[], Path | None]) -> None:
        """`folder`: in diffusers' layout, with safetensors; None before it was fetched, or where there is none."""
        self._folder = folder

    def check(self, pixels: Pixels, mode: Safety, models: ModelManager) -> tuple[Pixels, bool]:
        """Pixels (H, W, 3), 0 to 255, hidden as the mode says where they are unsafe, and whether they are.

        NodeFault where the checker cannot be loaded.
        """
        with models.pinned("safety_checker", lambda dtype: _load(self._folder(), dtype)) as model:
            is_unsafe = _is_unsafe(pixels, model)
        return (_hidden(pixels, mode) if is_unsafe else pixels), is_unsafe


def _is_unsafe(pixels: Pixels, model: Any) -> bool:
    clip_input = _clip_input(pixels).to(model.concept_embeds.device, model.concept_embeds.dtype)
    is_unsafe: bool = model(clip_input)
    return is_unsafe


def _load(folder: Path | None, dtype: torch.dtype) -> Any:
    if folder is None:
        raise NodeFault("this worker has no safety checker")
    try:
        return load_safety_net(folder, dtype)
    except _DAMAGE as error:
        if is_out_of_memory(error):
            raise
        raise NodeFault("the safety checker cannot be loaded: a file is missing or damaged") from error


def _clip_input(pixels: Pixels) -> Tensor:
    """(1, 3, 224, 224): the shorter side scaled, the middle cropped, normalized, as CLIP's own preprocessing."""
    image = Image.fromarray(pixels)
    scale = _SIDE_PX / min(image.size)
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - _SIDE_PX) // 2, (scaled.height - _SIDE_PX) // 2
    cropped = scaled.crop((left, top, left + _SIDE_PX, top + _SIDE_PX))
    unit = torch.from_numpy(np.asarray(cropped, dtype=np.float32) / 255.0)
    return ((unit - torch.tensor(_MEAN)) / torch.tensor(_DEVIATION)).permute(2, 0, 1)[None]


def _hidden(pixels: Pixels, mode: Safety) -> Pixels:
    if mode is Safety.BLOCK:
        return np.zeros_like(pixels)
    if mode is Safety.BLUR:
        radius = max(pixels.shape[:2]) * _BLUR
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    return pixels


# transformers' defaults for the vision encoder where they are not those for the text encoder.
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


def load_safety_net(folder: Path, dtype: torch.dtype) -> Any:
    """From diffusers' layout, with safetensors. OSError, ValueError or KeyError where a file is missing or damaged."""
    saved = read_json(folder / "config.json")
    config = ClipConfig.of({**_VISION, **saved["vision_config"], "projection_dim": saved.get("projection_dim", 512)})
    found = {_tensor_name(name): tensor for name, tensor in folder_tensors(folder, "safety checker").items()}
    with build_empty():
        empty = SafetyNet(config)
    return fill_module(empty.eval(), found, LoadTarget(dtype=dtype))


def _tensor_name(name: str) -> str:
    """Files of older versions have `vision_model.` twice before names."""
    return name.replace("vision_model.vision_model.", "vision_model.", 1)
