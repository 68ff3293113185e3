"""What a request means where it says nothing, and how it is split into images."""

import pytest

from fanlight.common.v1.common_pb2 import Blob, ImageSource
from fanlight.contract.generation import (
    PIPELINES,
    check,
    check_one_image,
    check_resolved,
    count_of,
    guidance_of,
    is_guided,
    lora_weights,
    pipeline_of,
    split,
    steps_of,
    strength_of,
)
from fanlight.diffusion.v1.diffusion_pb2 import Control, GenerateRequest, LoraUse
from fanlight.errors import InvalidField

IMAGE = ImageSource(data=b"image")
BLOB = Blob(digest=f"sha256:{'0' * 64}")
CANNY = Control(controlnet="canny", image=IMAGE)


def drawn() -> int:
    return 2**32 - 1


def seeds_of(**fields) -> list[tuple[int, int | None]]:
    """Of each image, its seed and variation seed."""
    found = []
    for patch in split(GenerateRequest(**fields), drawn):
        assert patch.count == 1
        found.append((patch.seed, patch.variation_seed if patch.HasField("variation_seed") else None))
    return found


def test_seeds_count_up():
    assert seeds_of(seed=7, count=3) == [(7, None), (8, None), (9, None)]
    assert seeds_of(seed=7) == [(7, None)]


def test_seeds_go_round():
    assert seeds_of(seed=2**64 - 1, count=2) == [(2**64 - 1, None), (0, None)]
    assert seeds_of(count=2) == [(2**32 - 1, None), (0, None)]


def test_a_variation_keeps_the_seed_and_counts_its_own_up():
    assert seeds_of(seed=7, variation_seed=3, variation_strength=0.1, count=2) == [(7, 3), (7, 4)]
    assert seeds_of(seed=7, variation_strength=0.1, count=2) == [(7, 2**32 - 1), (7, 0)]


def test_a_variation_of_strength_0_is_none():
    assert seeds_of(seed=7, variation_seed=3, variation_strength=0.0, count=2) == [(7, None), (8, None)]


def test_a_patch_changes_nothing_else():
    request = GenerateRequest(prompt="a cup", count=2, seed=1, controls=[CANNY])
    merged = GenerateRequest.FromString(request.SerializeToString())
    merged.MergeFrom(split(request, drawn)[1])

    assert merged == GenerateRequest(prompt="a cup", count=1, seed=2, controls=[CANNY])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_chosen_by_what_there_is(name):
    request = GenerateRequest(
        image=IMAGE if "img2img" in name or "inpaint" in name else None,
        mask=IMAGE if "inpaint" in name else None,
        controls=[CANNY] if "controlnet" in name else [],
    )
    assert pipeline_of(request) == name
    check(request)
    request.pipeline = name
    check(request)


def test_what_is_left_out_has_its_default():
    request = GenerateRequest()
    assert (steps_of(request), guidance_of(request), count_of(request), is_guided(request)) == (20, 5.0, 1, True)
    assert strength_of(request) is None
    assert strength_of(GenerateRequest(image=IMAGE)) == 0.8
    assert strength_of(GenerateRequest(image=IMAGE, mask=IMAGE)) == 1.0
    assert strength_of(GenerateRequest(image=IMAGE, strength=0.3)) == 0.3


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (1.0, False), (1.1, True)])
def test_a_guidance_of_1_guides_nothing(scale, guided):
    assert is_guided(GenerateRequest(guidance_scale=scale)) is guided


def test_the_weights_of_a_lora_add_up():
    request = GenerateRequest(
        prompt="a <lora:one:0.5> cup <lora:one:1:-1> <lora:two>",
        loras=[LoraUse(model="one", weight=0.25), LoraUse(model="three", weight=2, text_encoder_weight=0)],
    )
    assert lora_weights(request) == {"one": (-0.25, 1.75), "three": (2.0, 0.0), "two": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (GenerateRequest(count=2), "count"),
        (GenerateRequest(controls=[CANNY, Control(annotator="canny", image=IMAGE)]), "controls[1].annotator"),
        (GenerateRequest(image=ImageSource(blob=BLOB)), "image"),
        (
            GenerateRequest(controls=[Control(controlnet="canny", image=ImageSource(blob=BLOB))]),
            "controls[0].image",
        ),
    ],
)
def test_a_worker_makes_one_image_of_what_it_was_sent(request_, field):
    check(request_)
    with pytest.raises(InvalidField) as caught:
        check_one_image(request_)

    assert caught.value.field == field


def test_a_worker_takes_what_the_gateway_sends():
    check_one_image(GenerateRequest(count=1, seed=1, controls=[CANNY], image=IMAGE))


def test_a_worker_takes_an_image_as_a_data_url():
    check_one_image(GenerateRequest(image=ImageSource(url="data:,a")))


def test_only_inpaints_controlnet_makes_its_own_control_image():
    request = GenerateRequest(image=IMAGE, mask=IMAGE, controls=[Control(controlnet="control_v11p_sd15_inpaint")])
    check(request)
    request.controls[0].controlnet = "inpaint"
    check_resolved(request)
    request.controls[0].controlnet = "inpaint-of-another"
    with pytest.raises(InvalidField) as caught:
        check_resolved(request)

    assert caught.value.field == "controls[0].image"


def test_a_number_as_text_keeps_its_digits():
    with pytest.raises(InvalidField, match="is 4294967295; must be 1 to 150"):
        check(GenerateRequest(steps=2**32 - 1))
