"""Every field of a request has its bounds; what is left open is filled in."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fanlight.common.v1 import common_pb2
from fanlight.contract import generation as contract
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FailedPrecondition, InvalidField, NotFound, TooLarge
from services.diffusion.engine.generation import Pipeline, Safety
from services.diffusion.images import Format, Resize, encode_png
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.parse.parser import effective_to_proto
from services.diffusion.provenance import infotext

GenerateRequest, Control = diffusion_pb2.GenerateRequest, diffusion_pb2.Control
LoraUse = diffusion_pb2.LoraUse
NAN = float("nan")


def _image(width: int, height: int) -> common_pb2.ImageSource:
    return common_pb2.ImageSource(data=encode_png(np.zeros((height, width, 3), dtype=np.uint8)))


IMAGE, OTHER_SIZE = _image(96, 64), _image(64, 64)
CANNY = Control(controlnet="canny", image=IMAGE)


@pytest.fixture(scope="module")
def image() -> common_pb2.ImageSource:
    return _image(16, 8)


def test_what_is_left_open_is_filled_in(parser):
    effective = effective_to_proto(parser.parse(GenerateRequest(prompt="a cat")))
    assert effective == GenerateRequest(
        model="tiny",
        pipeline="text2img",
        prompt="a cat",
        width_px=64,
        height_px=64,
        steps=20,
        guidance_scale=5.0,
        scheduler="ddim",
        eta=0.0,
        variation_strength=0.0,
        seed=42,
        clip_skip=1,
        format="png",
        quality=90,
        safety_checker="off",
        prompt_syntax="strict",
        emphasis="original",
    )


def test_a_control_fills_in_its_pipeline_and_strength(parser, image):
    request = GenerateRequest(controls=[Control(controlnet="canny", image=image)], seed=2**64 - 1)
    effective = effective_to_proto(parser.parse(request))
    assert effective.pipeline == "controlnet"
    assert effective.seed == 2**64 - 1
    assert list(effective.controls) == [Control(controlnet="canny", scale=1.0, start=0.0, end=1.0)]


def test_a_control_image_gets_the_images_size(parser, image):
    request = GenerateRequest(width_px=64, height_px=96, controls=[Control(controlnet="canny", image=image)])
    assert parser.parse(request).controls[0].image.size == (64, 96)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("steps", GenerateRequest(steps=0)),
        ("steps", GenerateRequest(steps=151)),
        ("width_px", GenerateRequest(width_px=66, height_px=64)),
        ("height_px", GenerateRequest(width_px=64)),
        ("guidance_scale", GenerateRequest(guidance_scale=-0.1)),
        ("guidance_scale", GenerateRequest(guidance_scale=31)),
        ("guidance_scale", GenerateRequest(guidance_scale=NAN)),
        ("controls", GenerateRequest(pipeline="controlnet")),
        ("controls", GenerateRequest(controls=[Control(controlnet="canny")] * 9)),
        ("controls[0].controlnet", GenerateRequest(controls=[Control()])),
        ("controls[0].image", GenerateRequest(controls=[Control(controlnet="canny")])),
        ("controls[0].scale", GenerateRequest(controls=[Control(controlnet="canny", scale=2.1)])),
        ("controls[0].scale", GenerateRequest(controls=[Control(controlnet="canny", scale=NAN)])),
        ("controls[0].end", GenerateRequest(controls=[Control(controlnet="canny", start=0.5, end=0.5)])),
        ("controls[0].end", GenerateRequest(controls=[Control(controlnet="canny", end=1.5)])),
        ("image", GenerateRequest(pipeline="img2img")),
        ("mask", GenerateRequest(pipeline="inpaint", image=IMAGE)),
        ("image", GenerateRequest(mask=IMAGE)),
        ("mask", GenerateRequest(image=IMAGE, mask=OTHER_SIZE)),
        ("pipeline", GenerateRequest(pipeline="text2img", image=IMAGE)),
        ("pipeline", GenerateRequest(pipeline="img2img", image=IMAGE, mask=IMAGE)),
        ("pipeline", GenerateRequest(pipeline="inpaint", image=IMAGE, mask=IMAGE, controls=[CANNY])),
        ("pipeline", GenerateRequest(pipeline="controlnet", image=IMAGE, controls=[CANNY])),
        ("strength", GenerateRequest(strength=0.5)),
        ("strength", GenerateRequest(image=IMAGE, strength=1.1)),
        ("strength", GenerateRequest(image=IMAGE, strength=0.04)),
        ("strength", GenerateRequest(image=IMAGE, strength=NAN)),
        ("clip_skip", GenerateRequest(clip_skip=0)),
        ("clip_skip", GenerateRequest(clip_skip=13)),
        ("eta", GenerateRequest(eta=1.5)),
        ("quality", GenerateRequest(quality=101)),
        ("preview_every_steps", GenerateRequest(preview_every_steps=151)),
        ("noise_schedule", GenerateRequest(scheduler="ddim", noise_schedule="karras")),
        ("loras[0].model", GenerateRequest(loras=[LoraUse()])),
        ("loras[0].weight", GenerateRequest(loras=[LoraUse(model="nobody", weight=5)])),
        ("loras", GenerateRequest(loras=[LoraUse(model="nobody")] * 17)),
        ("negative_prompt", GenerateRequest(negative_prompt="<lora:nobody:1>")),
        ("prompt", GenerateRequest(prompt="a (cat")),
        ("resize", GenerateRequest(resize="squeeze")),
        ("format", GenerateRequest(format="bmp")),
        ("safety_checker", GenerateRequest(safety_checker="maybe")),
        ("precision", GenerateRequest(precision="float8")),
        ("variation_strength", GenerateRequest(variation_strength=1.1)),
        ("variation_strength", GenerateRequest(variation_seed=1)),
        ("count", GenerateRequest(count=2)),
        ("controls[0].annotator", GenerateRequest(controls=[Control(annotator="canny", image=IMAGE)])),
    ],
)
def test_a_wrong_value_names_its_field(field, request_, parser):
    with pytest.raises(InvalidField) as caught:
        parser.parse(request_)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("model", GenerateRequest(model="nobody")),
        ("pipeline", GenerateRequest(pipeline="img2video")),
        ("scheduler", GenerateRequest(scheduler="DPM adaptive")),
        ("noise_schedule", GenerateRequest(noise_schedule="cosine")),
        ("loras[0].model", GenerateRequest(loras=[LoraUse(model="nobody")])),
        ("prompt", GenerateRequest(prompt="a cat <lora:nobody:1>")),
        ("vae", GenerateRequest(vae="nobody")),
        ("embeddings[0]", GenerateRequest(embeddings=["nobody"])),
        ("controls[0].controlnet", GenerateRequest(controls=[Control(controlnet="nobody", image=IMAGE)])),
    ],
)
def test_an_unknown_name_is_not_found(field, request_, parser):
    with pytest.raises(NotFound) as caught:
        parser.parse(request_)
    assert caught.value.field == field


def test_how_a_control_image_was_made_is_in_the_provenance(parser, image):
    control = diffusion_pb2.Control(controlnet="canny", image=image)
    control.made_by.annotator = "canny"
    control.made_by.parameters.update({"low": 100, "high": 200})
    generation = parser.parse(diffusion_pb2.GenerateRequest(controls=[control]))
    made_by = effective_to_proto(generation).controls[0].made_by
    assert (made_by.annotator, dict(made_by.parameters)) == ("canny", {"low": 100.0, "high": 200.0})
    assert "Module: canny, Model: canny" in infotext(generation, lambda entry: (), version="1")


def test_text2img_with_a_control_is_refused(parser, image):
    request = GenerateRequest(pipeline="text2img", controls=[Control(controlnet="canny", image=image)])
    with pytest.raises(InvalidField) as caught:
        parser.parse(request)
    assert caught.value.field == "pipeline"


@pytest.mark.parametrize(
    "image",
    [
        common_pb2.ImageSource(url="data:image/png;base64,AAAA"),
        common_pb2.ImageSource(data=b""),
        common_pb2.ImageSource(blob=common_pb2.Blob(digest="sha256:" + "0" * 64)),
        common_pb2.ImageSource(data=b"no picture"),
    ],
)
def test_only_images_in_the_request_are_taken(image, parser):
    with pytest.raises(InvalidField) as caught:
        parser.parse(GenerateRequest(controls=[Control(controlnet="canny", image=image)]))
    assert caught.value.field == "controls[0].image"


def test_only_a_data_url_is_taken(parser):
    url = common_pb2.ImageSource(url="https://example.com/a.png")
    with pytest.raises(InvalidField, match="nothing is fetched") as caught:
        parser.parse(GenerateRequest(controls=[Control(controlnet="canny", image=url)]))
    assert caught.value.field == "controls[0].image.url"


def test_a_data_url_is_the_image_that_it_holds(parser):
    url = f"data:image/png;base64,{base64.b64encode(IMAGE.data).decode()}"
    same = common_pb2.ImageSource(url=url)
    by_url = GenerateRequest(image=same, mask=same, controls=[Control(controlnet="canny", image=same)])
    by_data = GenerateRequest(image=IMAGE, mask=IMAGE, controls=[CANNY])
    one, other = parser.parse(by_url), parser.parse(by_data)
    assert one == other
    assert one.image_digests == other.image_digests != ()
    assert one.start.image.tobytes() == other.start.image.tobytes()
    assert one.controls[0].image.tobytes() == other.controls[0].image.tobytes()


def test_an_image_above_the_limit_is_too_large(parser):
    with pytest.raises(TooLarge) as caught:
        parser.parse(GenerateRequest(width_px=256, height_px=260))
    assert (caught.value.field, caught.value.is_request_fault) == ("width_px", False)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        # The tiny model's text encoder has two layers.
        ("clip_skip", GenerateRequest(clip_skip=3)),
        ("precision", GenerateRequest(precision="bfloat16")),
        ("safety_checker", GenerateRequest(safety_checker="flag")),
    ],
)
def test_what_this_worker_lacks_is_no_fault_of_the_request(field, request_, parser):
    with pytest.raises(FailedPrecondition) as caught:
        parser.parse(request_)
    assert (caught.value.field, caught.value.is_request_fault) == (field, False)


def test_what_this_worker_has_is_taken(parser):
    able = replace(parser, abilities=replace(parser.abilities, has_safety_checker=True))
    effective = effective_to_proto(able.parse(GenerateRequest(clip_skip=2, precision="float32", safety_checker="flag")))
    assert (effective.clip_skip, effective.precision, effective.safety_checker) == (2, "float32", "flag")


def test_sdxls_layers_count_from_the_last_one_too(parser):
    """So that the largest `clip_skip` that people send, which changes nothing for it, is taken as for SD 1."""
    entry = parser.catalog.default()
    sdxl = replace(entry, recipe=replace(entry.recipe, unet={**entry.recipe.unet, "addition_embed_type": "text_time"}))
    assert (entry.text_encoder_layers, sdxl.text_encoder_layers) == (2, 2)
    parser.abilities.check(GenerateRequest(model=sdxl.id, clip_skip=2, sdxl_clip_skip=2), sdxl)
    with pytest.raises(FailedPrecondition, match=r"is 3; the text encoder of .* takes 2 at most"):
        parser.abilities.check(GenerateRequest(model=sdxl.id, sdxl_clip_skip=3), sdxl)


def test_a_variation_seed_that_is_left_open_is_drawn(parser):
    effective = effective_to_proto(parser.parse(GenerateRequest(seed=1, variation_strength=0.25)))
    assert (effective.seed, effective.variation_seed, effective.variation_strength) == (1, 42, 0.25)


def test_a_variation_of_strength_0_is_none(parser):
    generation = parser.parse(GenerateRequest(variation_seed=5, variation_strength=0))
    assert (generation.variation_seed, generation.variation_strength) == (None, 0.0)
    assert not effective_to_proto(generation).HasField("variation_seed")


def test_the_choices_are_the_contracts():
    assert tuple(Pipeline) == contract.PIPELINES
    assert tuple(Safety) == contract.SAFETY_MODES
    assert tuple(Format) == contract.FORMATS
    assert tuple(Resize) == contract.RESIZES


def test_an_endless_prompt_is_too_large(parser):
    with pytest.raises(TooLarge) as caught:
        parser.parse(GenerateRequest(negative_prompt="x" * 10_001))
    assert caught.value.field == "negative_prompt"


@pytest.mark.parametrize(
    ("request_", "pipeline"),
    [
        (GenerateRequest(image=IMAGE), "img2img"),
        (GenerateRequest(image=IMAGE, mask=IMAGE), "inpaint"),
        (GenerateRequest(image=IMAGE, controls=[CANNY]), "controlnet_img2img"),
        (GenerateRequest(image=IMAGE, mask=IMAGE, controls=[CANNY]), "controlnet_inpaint"),
        (GenerateRequest(controls=[CANNY]), "controlnet"),
    ],
)
def test_the_pipeline_is_told_apart_from_what_is_set(request_, pipeline, parser):
    assert effective_to_proto(parser.parse(request_)).pipeline == pipeline


def test_an_image_to_start_from_gives_its_own_size_and_strength(parser):
    generation = parser.parse(GenerateRequest(image=_image(99, 65)))
    assert (generation.width_px, generation.height_px) == (96, 64)
    assert generation.start.image.size == (96, 64)
    assert generation.start.strength == 0.8


def test_a_large_image_to_start_from_is_scaled_down_as_on_every_other_worker(parser):
    large = replace(parser, abilities=replace(parser.abilities, pixels_limit=2**22))
    generation = large.parse(GenerateRequest(image=_image(4000, 1000)))
    assert (generation.width_px, generation.height_px) == (2048, 512)
    # This worker's own limit refuses a size, and never changes it.
    with pytest.raises(TooLarge) as caught:
        parser.parse(GenerateRequest(image=_image(1024, 512)))
    assert caught.value.field == "width_px"


def test_an_effective_request_sent_again_is_the_same_request(parser):
    request = GenerateRequest(prompt="a (cat:1.2)", scheduler="DPM++ 2M Karras", image=IMAGE, mask=IMAGE, strict=True)
    first = effective_to_proto(parser.parse(request))
    again = diffusion_pb2.GenerateRequest()
    again.CopyFrom(first)
    again.image.CopyFrom(IMAGE)
    again.mask.CopyFrom(IMAGE)
    assert effective_to_proto(parser.parse(again)) == first


@pytest.fixture
def with_nets(parser):
    """The parser with `canny` under another id as well."""

    def named(name):
        catalog = ModelCatalog([*parser.catalog.entries, replace(parser.catalog.controlnets[0], id=name)])
        return replace(parser, catalog=catalog)

    return named


def test_the_controlnet_inpaint_takes_image_and_mask_of_the_request(with_nets):
    request = GenerateRequest(image=IMAGE, mask=IMAGE, controls=[Control(controlnet="inpaint")])
    [control] = with_nets("inpaint").parse(request).controls
    assert (control.image.size, control.mask.size) == ((96, 64), (96, 64))


def test_the_controlnet_inpaint_conditions_pure_noise_too(with_nets):
    request = GenerateRequest(pipeline="controlnet", image=IMAGE, mask=IMAGE, controls=[Control(controlnet="inpaint")])
    generation = with_nets("inpaint").parse(request)
    assert generation.start is None
    assert generation.controls[0].mask is not None


def test_the_controlnet_inpaint_takes_what_its_control_image_leaves_transparent(with_nets):
    """As the annotator of that name makes it."""
    pixels = np.full((64, 96, 4), 255, dtype=np.uint8)
    pixels[:, :32] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    controls = [Control(controlnet="inpaint", image=common_pb2.ImageSource(data=file.getvalue()))]
    generation = with_nets("inpaint").parse(GenerateRequest(width_px=96, height_px=64, controls=controls))
    [control] = generation.controls
    assert generation.pipeline == "controlnet"
    assert control.image.mode == "RGB"
    assert (np.asarray(control.mask) == np.where(pixels[:, :, 3] == 0, 255, 0)).all()


def test_the_controlnet_inpaint_without_a_mask_is_refused(with_nets):
    request = GenerateRequest(controls=[Control(controlnet="inpaint", image=IMAGE)])
    with pytest.raises(InvalidField, match="needs a mask"):
        with_nets("inpaint").parse(request)


def test_lineart_anime_was_trained_on_the_layer_before_the_last(with_nets):
    request = GenerateRequest(controls=[Control(controlnet="lineart_anime", image=IMAGE)])
    assert with_nets("lineart_anime").parse(request).clip_skip == 2
    request.clip_skip = 1
    assert with_nets("lineart_anime").parse(request).clip_skip == 1


def test_a_checkpoint_made_for_inpainting_does_nothing_else(parser):
    entry = parser.catalog.default()
    recipe = replace(entry.recipe, unet={**entry.recipe.unet, "in_channels": 9})
    only = replace(parser, catalog=ModelCatalog([replace(entry, recipe=recipe)]))
    assert effective_to_proto(only.parse(GenerateRequest(image=IMAGE, mask=IMAGE))).pipeline == "inpaint"
    with pytest.raises(InvalidField, match="inpaint") as caught:
        only.parse(GenerateRequest(prompt="a cat"))
    assert caught.value.field == "pipeline"


def test_what_was_mended_in_a_prompt_is_warned_of(parser):
    generation = parser.parse(GenerateRequest(prompt="a [cat:dog:3] AND <lora:x", prompt_syntax="a1111"))
    assert generation.prompt == "a [cat:dog:3] AND <lora:x"
    assert generation.warnings == ("prompt: character 19: '<lora:' is never closed by a '>'; it is taken as text",)


def test_a_clip_skip_of_another_kind_of_checkpoint_is_warned_of(parser):
    generation = parser.parse(GenerateRequest(sdxl_clip_skip=2))
    assert generation.warnings == ("sdxl_clip_skip: changes nothing for tiny, which is not SDXL; clip_skip does",)
    with pytest.raises(FailedPrecondition, match="is 6; the text encoder of tiny takes 2 at most") as caught:
        parser.parse(GenerateRequest(sdxl_clip_skip=6))
    assert caught.value.field == "sdxl_clip_skip"
