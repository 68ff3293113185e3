"""The safety checker flags, blurs or blocks what it does not like, and is not there when it is off."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from services.diffusion.engine.safety import SafetyChecker
from services.diffusion.generation import Safety
from services.kernel.errors import NodeFault

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=224, patch_size=56, projection_dim=16)
    text = CLIPTextConfig(**sizes, vocab_size=8, projection_dim=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    checker = StableDiffusionSafetyChecker(config)
    # Whatever it sees is as near to every concept as this lets it be.
    checker.concept_embeds.data.fill_(1.0)
    checker.concept_embeds_weights.data.fill_(-2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    place = tmp_path_factory.mktemp("safety")
    checker.save_pretrained(place, safe_serialization=True)
    return place


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", [Safety.FLAG, Safety.BLUR, Safety.BLOCK])
def test_what_it_does_not_like_is_treated_as_asked(mode, folder, picture):
    pixels, is_unsafe = SafetyChecker(folder).checked(picture, mode, CPU)
    assert is_unsafe
    if mode is Safety.FLAG:
        assert np.array_equal(pixels, picture)
    elif mode is Safety.BLUR:
        assert pixels.std() < picture.std() / 4
    else:
        assert not pixels.any()


def test_what_it_likes_stays_as_it_is(folder, picture):
    checker = SafetyChecker(folder)
    checker.checked(picture, Safety.FLAG, CPU)
    checker._model.concept_embeds_weights.data.fill_(2.0)
    pixels, is_unsafe = checker.checked(picture, Safety.BLOCK, CPU)
    assert not is_unsafe
    assert np.array_equal(pixels, picture)


@pytest.mark.parametrize("kept", [None, "nothing"])
def test_without_its_weights_it_says_so(kept, tmp_path, picture):
    with pytest.raises(NodeFault, match="safety checker"):
        SafetyChecker(tmp_path if kept else None).checked(picture, Safety.FLAG, CPU)


def test_a_picture_that_is_not_checked_says_nothing_of_it(asked, painted, studio):
    [row] = painted(asked(steps=1))
    assert studio.finish(row).nsfw is None
