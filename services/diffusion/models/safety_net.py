"""The network of Stable Diffusion's safety checker: whether a picture is near to what it knows as unsafe.

As diffusers' StableDiffusionSafetyChecker judges, from the same files; what comes of it is not decided here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from services.diffusion.models.clip import ClipConfig, ClipEye
from services.diffusion.models.empty import built_empty
from services.diffusion.models.loading import Room, filled
from services.diffusion.models.recipes import read_json
from services.diffusion.models.tensors import folder_tensors

CONCEPTS, SPECIAL_CONCEPTS = 17, 3
# What each nearness is lowered by where a special concept is seen.
_ADJUSTMENT = 0.01
_DIGITS = 3
# transformers' defaults for the eye where they are not those for the text.
_EYE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


class SafetyNet(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.projection_dim
        self.vision_model = ClipEye(config)
        self.visual_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.zeros(CONCEPTS, width))
        self.special_care_embeds = nn.Parameter(torch.zeros(SPECIAL_CONCEPTS, width))
        self.concept_embeds_weights = nn.Parameter(torch.zeros(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.zeros(SPECIAL_CONCEPTS))

    @torch.inference_mode()
    def forward(self, picture: Tensor) -> bool:
        """`picture`: (1, 3, H, W) as CLIP takes it."""
        seen = normalize(self.visual_projection(self.vision_model(picture)))
        adjustment = 0.0
        for score in _scores(seen, self.special_care_embeds, self.special_care_embeds_weights):
            adjustment = _ADJUSTMENT if round(score + adjustment, _DIGITS) > 0 else adjustment
        scores = _scores(seen, self.concept_embeds, self.concept_embeds_weights)
        return any(round(score + adjustment, _DIGITS) > 0 for score in scores)


def _scores(seen: Tensor, concepts: Tensor, thresholds: Tensor) -> list[float]:
    """How much nearer than its threshold the picture is to each."""
    near = (seen @ normalize(concepts).t()).float()[0]
    scores: list[float] = (near - thresholds.float()).tolist()
    return scores


def load_safety_net(folder: Path, dtype: torch.dtype) -> Any:
    """From diffusers' layout, with safetensors. OSError, ValueError or KeyError where a file is missing or damaged."""
    told = read_json(folder / "config.json")
    config = ClipConfig.of({**_EYE, **told["vision_config"], "projection_dim": told.get("projection_dim", 512)})
    found = {_plain(name): tensor for name, tensor in folder_tensors(folder, "safety checker").items()}
    with built_empty():
        empty = SafetyNet(config)
    return filled(empty.eval(), found, Room(dtype=dtype))


def _plain(name: str) -> str:
    """`vision_model.` stands twice before names in files of older versions."""
    return name.replace("vision_model.vision_model.", "vision_model.", 1)
