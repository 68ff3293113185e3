"""The safety checker flags, blurs or blocks what it does not like, and is not there when it is off."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from fanlight.errors import NodeFault
from services.diffusion.engine.generation import Safety
from services.diffusion.engine.safety import SafetyChecker, load_safety_net
from services.diffusion.models.model_manager import ModelManager
from tests.fakes.device import FakeGpu


def _checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=224, patch_size=56, projection_dim=16)
    text = CLIPTextConfig(**sizes, vocab_size=8, projection_dim=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    return StableDiffusionSafetyChecker(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    checker = _checker()
    # Whatever it sees is as near to every concept as this lets it be.
    checker.concept_embeds.data.fill_(1.0)
    checker.concept_embeds_weights.data.fill_(-2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    place = tmp_path_factory.mktemp("safety")
    checker.save_pretrained(place, safe_serialization=True)
    return place


@pytest.fixture
def image() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", [Safety.FLAG, Safety.BLUR, Safety.BLOCK])
def test_what_it_does_not_like_is_treated_as_asked(mode, folder, image):
    pixels, is_unsafe = SafetyChecker(lambda: folder).check(image, mode, ModelManager(device="cpu"))
    assert is_unsafe
    if mode is Safety.FLAG:
        assert np.array_equal(pixels, image)
    elif mode is Safety.BLUR:
        assert pixels.std() < image.std() / 4
    else:
        assert not pixels.any()


def test_what_it_likes_stays_as_it_is(folder, image):
    checker, manager = SafetyChecker(lambda: folder), ModelManager(device="cpu")
    checker.check(image, Safety.FLAG, manager)
    with manager.pinned("safety_checker", lambda dtype: None) as model:
        model.concept_embeds_weights.data.fill_(2.0)
    pixels, is_unsafe = checker.check(image, Safety.BLOCK, manager)
    assert not is_unsafe
    assert np.array_equal(pixels, image)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4])
def test_it_judges_as_diffusers_does(threshold, tmp_path):
    torch.manual_seed(7)
    theirs = _checker()
    for weights in (theirs.concept_embeds, theirs.special_care_embeds):
        weights.data.normal_()
    theirs.concept_embeds_weights.data.fill_(threshold)
    theirs.special_care_embeds_weights.data.fill_(threshold)
    theirs.save_pretrained(tmp_path)
    ours = load_safety_net(tmp_path, torch.float32)
    for _ in range(4):
        image = torch.randn(1, 3, 224, 224)
        assert torch.allclose(ours.vision_model(image), theirs.vision_model(image)[1], atol=1e-5)
        assert ours(image) == theirs(clip_input=image, images=np.zeros((1, 8, 8, 3)))[1][0]


@pytest.mark.parametrize("kept", [None, "nothing"])
def test_without_its_weights_it_says_so(kept, tmp_path, image):
    with pytest.raises(NodeFault, match="safety checker"):
        SafetyChecker(lambda: tmp_path if kept else None).check(image, Safety.FLAG, ModelManager(device="cpu"))


def test_on_a_gpu_it_takes_its_part_of_the_memory_and_goes_when_others_need_it(folder, image):
    gpu = FakeGpu()
    manager = ModelManager(open_device=lambda wanted: gpu, vram_bytes=1 << 20)
    SafetyChecker(lambda: folder).check(image, Safety.FLAG, manager)
    assert manager.used_bytes > 0
    assert gpu.uploads == 1
    manager.release()
    SafetyChecker(lambda: folder).check(image, Safety.FLAG, manager)
    assert gpu.uploads == 2


def test_an_image_that_is_not_checked_says_nothing_of_it(asked, generated, backend):
    [row] = generated(asked(steps=1))
    assert backend.finish(row).nsfw is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_where_the_gpu_has_no_room_for_it_a_generated_image_is_looked_at_from_ram(folder, image, dtype):
    gpu = FakeGpu()
    gpu.dtype = dtype
    manager = ModelManager(open_device=lambda wanted: gpu, vram_bytes=1)
    _, is_unsafe = SafetyChecker(lambda: folder).check(image, Safety.FLAG, manager)
    assert gpu.uploads == 0
    assert is_unsafe == SafetyChecker(lambda: folder).check(image, Safety.FLAG, ModelManager(device="cpu"))[1]
