"""Every field of a request has its bounds; what is left open is filled in."""

import pytest

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.pictures.png import encode_png
from services.diffusion.wire import effective_to_proto
from services.kernel.errors import InvalidField, NotFound, TooLarge

GenerateRequest, Control = diffusion_pb2.GenerateRequest, diffusion_pb2.Control
NAN = float("nan")


@pytest.fixture(scope="module")
def picture() -> common_pb2.Picture:
    import numpy as np

    return common_pb2.Picture(data=encode_png(np.zeros((8, 16, 3), dtype=np.uint8)))


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
        seed=42,
    )


def test_a_control_fills_in_its_pipeline_and_strength(parser, picture):
    request = GenerateRequest(controls=[Control(controlnet="canny", image=picture)], seed=2**64 - 1)
    effective = effective_to_proto(parser.parse(request))
    assert effective.pipeline == "controlnet"
    assert effective.seed == 2**64 - 1
    assert list(effective.controls) == [Control(controlnet="canny", scale=1.0, start=0.0, end=1.0)]


def test_a_control_image_gets_the_pictures_size(parser, picture):
    request = GenerateRequest(width_px=32, height_px=48, controls=[Control(controlnet="canny", image=picture)])
    assert parser.parse(request).controls[0].image.size == (32, 48)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("steps", GenerateRequest(steps=0)),
        ("steps", GenerateRequest(steps=151)),
        ("width_px", GenerateRequest(width_px=7, height_px=64)),
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
        ("controls[0].start", GenerateRequest(controls=[Control(controlnet="canny", start=0.5, end=0.5)])),
        ("controls[0].end", GenerateRequest(controls=[Control(controlnet="canny", end=1.5)])),
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
        ("scheduler", GenerateRequest(scheduler="LMSDiscreteScheduler")),
        ("controls[0].controlnet", GenerateRequest(controls=[Control(controlnet="nobody")])),
    ],
)
def test_an_unknown_name_is_not_found(field, request_, parser):
    with pytest.raises(NotFound) as caught:
        parser.parse(request_)
    assert caught.value.field == field


def test_text2img_with_a_control_is_refused(parser, picture):
    request = GenerateRequest(pipeline="text2img", controls=[Control(controlnet="canny", image=picture)])
    with pytest.raises(InvalidField) as caught:
        parser.parse(request)
    assert caught.value.field == "pipeline"


@pytest.mark.parametrize(
    "image",
    [
        common_pb2.Picture(url="data:image/png;base64,AAAA"),
        common_pb2.Picture(blob=common_pb2.Blob(digest="sha256:" + "0" * 64)),
        common_pb2.Picture(data=b"no picture"),
    ],
)
def test_only_pictures_sent_as_bytes_are_taken(image, parser):
    with pytest.raises(InvalidField) as caught:
        parser.parse(GenerateRequest(controls=[Control(controlnet="canny", image=image)]))
    assert caught.value.field == "controls[0].image"


def test_a_picture_above_the_limit_is_too_large(parser):
    with pytest.raises(TooLarge):
        parser.parse(GenerateRequest(width_px=256, height_px=260))


def test_an_endless_prompt_is_too_large(parser):
    with pytest.raises(TooLarge) as caught:
        parser.parse(GenerateRequest(negative_prompt="x" * 10_001))
    assert caught.value.field == "negative_prompt"
