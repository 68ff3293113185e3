"""What a worker must offer for a request."""

from fanlight.common.v1.common_pb2 import ImageSource
from fanlight.contract.needs import Needs, needs_of, needs_of_annotation, scheduler_need
from fanlight.diffusion.v1.diffusion_pb2 import Control, GenerateRequest, LoraUse
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest


def test_every_need_has_the_field_that_asks_for_it():
    request = GenerateRequest(
        model="starter",
        prompt="a <lora:cyanotype:0.5> cup",
        scheduler="DPM++ 2M Karras",
        controls=[Control(controlnet="depth"), Control(controlnet="canny", image=ImageSource(data=b"image"))],
        loras=[LoraUse(model="fur")],
        vae="sharp",
        embeddings=["mint"],
        clip_skip=2,
        width_px=512,
        height_px=768,
        safety_checker="block",
        precision="float16",
    )
    assert needs_of(request) == Needs(
        offers=(
            ("checkpoint:starter", "model"),
            ("controlnet:depth", "controls[0].controlnet"),
            ("controlnet:canny", "controls[1].controlnet"),
            ("lora:fur", "loras[0].model"),
            ("lora:cyanotype", "prompt"),
            ("vae:sharp", "vae"),
            ("embedding:mint", "embeddings[0]"),
            ("scheduler:dpmpp_2m", "scheduler"),
            ("safety_checker:block", "safety_checker"),
            ("precision:float16", "precision"),
        ),
        amounts=(("pixels", 393_216, "width_px"), ("text_encoder_layers:starter", 2, "clip_skip")),
    )


def test_an_annotation_needs_its_annotator_and_room_for_the_size_it_asks_for():
    request = AnnotateRequest(annotator="canny", width_px=8192, height_px=4096)
    assert needs_of_annotation(request) == Needs(
        offers=(("annotator:canny", "annotator"),), amounts=(("pixels", 33_554_432, "width_px"),)
    )
    without_size = AnnotateRequest(annotator="canny")
    assert needs_of_annotation(without_size) == Needs(offers=(("annotator:canny", "annotator"),), amounts=())


def test_what_is_left_open_needs_nothing():
    assert needs_of(GenerateRequest(prompt="a cup", safety_checker="off")) == Needs(offers=(), amounts=())


def test_a_reference_needs_a_worker_that_fetches_any():
    request = GenerateRequest(model="hf:org/repo", loras=[LoraUse(model="civitai:1@2"), LoraUse(model="civitai:3@4")])
    assert needs_of(request).offers == (("checkpoint:*", "model"), ("lora:*", "loras[0].model"))


def test_a_need_is_one_whatever_asks_for_it():
    request = GenerateRequest(prompt="<lora:fur:1> <lora:fur:0.5>", loras=[LoraUse(model="fur")])
    assert needs_of(request).offers == (("lora:fur", "loras[0].model"),)


def test_a_scheduler_is_needed_by_its_short_name():
    assert {scheduler_need(name) for name in ("k_euler_a", "EulerA", "Euler a")} == {"scheduler:euler_a"}
    assert scheduler_need("eulerdiscretescheduler") == "scheduler:EulerDiscreteScheduler"
