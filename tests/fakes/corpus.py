"""Requests, good and bad, with the answer that client, gateway and a worker asked directly must all give.

Fields are relative to the request: client and gateway put `generation.` or `annotation.` before them.
"""

import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from fanlight.common.v1.common_pb2 import Blob, ImageSource
from fanlight.diffusion.v1.diffusion_pb2 import AnnotatorUse, Control, GenerateRequest, LoraUse
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest

Request = GenerateRequest | AnnotateRequest
# gRPC's code, the field, and a part of the message.
Refusal = tuple[str, str, str]

NAN, INFINITY = float("nan"), float("inf")
INVALID, NOT_FOUND, TOO_LARGE = "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"


class Case(NamedTuple):
    name: str
    build: Callable[[], Request]
    # None: nothing in the request itself is wrong.
    expected: Refusal | None
    # Another answer than `expected` may come where no worker has what it names, or does what it asks for.
    depends_on_worker: bool = False
    # Only the gateway takes it: a worker makes one image, and takes images as bytes and controls without annotator.
    is_for_gateway: bool = False


def png(width_px: int = 64, height_px: int = 64) -> bytes:
    """A gray image, 8 bits."""
    rows = zlib.compress((b"\0" + b"\x80" * width_px) * height_px)
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


IMAGE = ImageSource(data=png())
MASKED = {"image": IMAGE, "mask": IMAGE}


def photo(**fields: Any) -> Control:
    """A control image that the annotator canny makes."""
    return Control(annotator="canny", image=IMAGE, **fields)


def edges(**fields: Any) -> Control:
    """A control image for the ControlNet canny."""
    return Control(controlnet="canny", image=IMAGE, **fields)


def with_parameters(control: Control, **values: float | str) -> Control:
    control.parameters.update(values)
    return control


def _generate(name: str, expected: Refusal | None = None, *, prompt: str = "a cup", **fields: Any) -> Case:
    marks = {mark: fields.pop(mark, False) for mark in ("depends_on_worker", "is_for_gateway")}
    return Case(name, lambda: GenerateRequest(prompt=prompt, **fields), expected, **marks)


def _annotate(
    name: str, expected: Refusal | None = None, *, parameters: dict[str, Any] | None = None, **fields: Any
) -> Case:
    depends_on_worker = fields.pop("depends_on_worker", False)

    def build() -> AnnotateRequest:
        request = AnnotateRequest(**{"annotator": "canny", "image": IMAGE, **fields})
        request.parameters.update(parameters or {})
        return request

    return Case(name, build, expected, depends_on_worker=depends_on_worker)


def _made_by(annotator: str, **parameters: Any) -> AnnotatorUse:
    use = AnnotatorUse(annotator=annotator)
    use.parameters.update(parameters)
    return use


def _nested_made_by(levels: int) -> AnnotatorUse:
    deep: Any = 1
    for _ in range(levels - 1):
        deep = {"deep": deep}
    return _made_by("canny", deep=deep)


# 10,000 characters in 150 parts: as many as fit with two escapes in JSON of ASCII, the others with one.
LONGEST_PROMPT = "\U0001f600" * 2_812 + "\u3000" * 7_188

# Where a name is that of a model, the starter has it: its ControlNet, LoRA, embedding and VAE.
PROMPTS = [
    _generate("a plain prompt"),
    _generate("no prompt at all", prompt=""),
    _generate("10,000 characters", prompt="cup, " * 2000),
    _generate("10,000 characters without a space", prompt="a" * 10_000),
    _generate("10,001 characters", (TOO_LARGE, "prompt", "10000"), prompt="a" * 10_001),
    _generate("12,000 characters", (TOO_LARGE, "prompt", "12000 characters"), prompt="a" * 12_000),
    _generate(
        "12,000 characters of negative prompt", (TOO_LARGE, "negative_prompt", "12000"), negative_prompt="a" * 12_000
    ),
    _generate("two prompts of 10,000 characters", prompt="a " * 5_000, negative_prompt="b " * 5_000),
    _generate("the prompts that are longest as JSON", prompt=LONGEST_PROMPT, negative_prompt=LONGEST_PROMPT),
    _generate("1,000 characters of three bytes", prompt="\u676f" * 1000),
    _generate("10,000 characters of three bytes", (INVALID, "prompt", "400 parts"), prompt="\u676f" * 10_000),
    _generate("149 BREAKs", prompt="a BREAK " * 149),
    _generate("1,000 BREAKs", (INVALID, "prompt", "1001 parts"), prompt="a BREAK " * 1000),
    _generate("weights, escapes and BREAK", prompt=r"a ((big)) [small] (red:1.2) \(cup\) BREAK on a table"),
    _generate("20 brackets in each other", prompt="(" * 20 + "a" + ")" * 20),
    _generate("21 brackets in each other", (INVALID, "prompt", "at most 20"), prompt="(" * 21 + "a" + ")" * 21),
    _generate("an open bracket", (INVALID, "prompt", "character 1: '(' is never closed"), prompt="(apple"),
    _generate("a bracket that closes nothing", (INVALID, "prompt", "closes nothing"), prompt="apple)"),
    _generate("three texts to edit", (INVALID, "prompt", "is neither"), prompt="a [b:c:d:0.5]"),
    _generate("AND in brackets", (INVALID, "prompt", "stands in brackets"), prompt="(a cup AND a pot)"),
    _generate("nine prompts", (INVALID, "prompt", "composes 9 prompts"), prompt=" AND ".join("abcdefghi")),
    _generate("AND in a negative prompt", (INVALID, "negative_prompt", "lower case"), negative_prompt="a AND b"),
    _generate("an unknown syntax", (INVALID, "prompt_syntax", "must be strict"), prompt_syntax="comfy"),
    _generate("an unknown emphasis", (INVALID, "emphasis", "must be original"), emphasis="much"),
    _generate("a weight that is no number", (INVALID, "prompt", "not a weight"), prompt="(cup:1.2x)"),
    _generate("a weight of 11", (INVALID, "prompt", "-10 to 10"), prompt="(cup:11)"),
    _generate("a weight of nan", (INVALID, "prompt", "-10 to 10"), prompt="(cup:nan)"),
    _generate("a mistake in the negative prompt", (INVALID, "negative_prompt", "never closed"), negative_prompt="[a"),
]

SIZES = [
    _generate("64 x 64", width_px=64, height_px=64),
    _generate("2048 x 2048", width_px=2048, height_px=2048, depends_on_worker=True),
    _generate("2056 x 512", (INVALID, "width_px", "64 to 2048"), width_px=2056, height_px=512),
    _generate("64 x 32", (INVALID, "height_px", "64 to 2048"), width_px=64, height_px=32),
    _generate("a width alone", (INVALID, "height_px", "both sides or none"), width_px=64),
    _generate("a height alone", (INVALID, "width_px", "both sides or none"), height_px=64),
    _generate("65 x 64", width_px=65, height_px=64, depends_on_worker=True),
]

NUMBERS = [
    _generate("1 step", steps=1),
    _generate("150 steps", steps=150),
    _generate("0 steps", (INVALID, "steps", "1 to 150"), steps=0),
    _generate("151 steps", (INVALID, "steps", "1 to 150"), steps=151),
    _generate("a guidance of 0", guidance_scale=0.0),
    _generate("a guidance of 30.5", (INVALID, "guidance_scale", "is 30.5; must be 0 to 30"), guidance_scale=30.5),
    _generate("a guidance below 0", (INVALID, "guidance_scale", "0 to 30"), guidance_scale=-0.1),
    _generate("a guidance of nan", (INVALID, "guidance_scale", "0 to 30"), guidance_scale=NAN),
    _generate("an infinite guidance", (INVALID, "guidance_scale", "0 to 30"), guidance_scale=INFINITY),
    _generate("an eta of 1", eta=1.0),
    _generate("an eta of 1.1", (INVALID, "eta", "0 to 1"), eta=1.1),
    _generate("an eta of nan", (INVALID, "eta", "0 to 1"), eta=NAN),
    _generate("clip skip 2", clip_skip=2, depends_on_worker=True),
    _generate("clip skip 12", clip_skip=12, depends_on_worker=True),
    _generate("clip skip 13", (INVALID, "clip_skip", "1 to 12"), clip_skip=13),
    _generate("clip skip 0", (INVALID, "clip_skip", "1 to 12"), clip_skip=0),
    _generate("a quality of 101", (INVALID, "quality", "1 to 100"), quality=101, format="webp"),
    _generate("a quality of 0", (INVALID, "quality", "1 to 100"), quality=0),
    _generate("previews every 151 steps", (INVALID, "preview_every_steps", "0 to 150"), preview_every_steps=151),
    _generate("the largest seed", seed=2**64 - 1),
    _generate("32 images", count=32, is_for_gateway=True),
    _generate("1 image", count=1),
    _generate("0 images", (INVALID, "count", "1 to 32"), count=0),
    _generate("33 images", (INVALID, "count", "1 to 32"), count=33),
    _generate("a variation", seed=1, variation_seed=2, variation_strength=0.3),
    _generate("a variation of a drawn seed", variation_strength=1.0),
    _generate("a variation of nothing", variation_seed=2, variation_strength=0.0),
    _generate("a variation seed alone", (INVALID, "variation_strength", "is missing"), variation_seed=2),
    _generate("a variation of 1.5", (INVALID, "variation_strength", "0 to 1"), variation_strength=1.5),
    _generate("a variation of nan", (INVALID, "variation_strength", "0 to 1"), variation_strength=NAN),
    _generate("a variation below 0", (INVALID, "variation_strength", "0 to 1"), variation_strength=-0.1),
]

CHOICES = [
    _generate("A1111's scheduler", scheduler="DPM++ 2M Karras"),
    _generate("A1111's scheduler in capitals", scheduler="DPM++ 2M KARRAS"),
    _generate("the Horde's scheduler", scheduler="k_euler_a"),
    _generate("Civitai's scheduler", scheduler="dpM2MKarras"),
    _generate("ComfyUI's scheduler", scheduler="uni_pc", noise_schedule="normal"),
    _generate("diffusers' scheduler", scheduler="EulerDiscreteScheduler", noise_schedule="KARRAS"),
    _generate("FooScheduler", (NOT_FOUND, "scheduler", "'FooScheduler'"), scheduler="FooScheduler"),
    _generate("IPNDMScheduler", (NOT_FOUND, "scheduler", "near it: PNDMScheduler"), scheduler="IPNDMScheduler"),
    _generate("DDIMParallelScheduler", (NOT_FOUND, "scheduler", "DDIMScheduler"), scheduler="DDIMParallelScheduler"),
    _generate("DPM adaptive", (NOT_FOUND, "scheduler", "'DPM adaptive'"), scheduler="DPM adaptive"),
    _generate("a scheduler of 600 bytes", (TOO_LARGE, "scheduler", "at most 512"), scheduler="e" * 600),
    _generate("an unknown noise schedule", (NOT_FOUND, "noise_schedule", "karras"), noise_schedule="cosine"),
    _generate("ddim with Karras", (INVALID, "noise_schedule", "cannot follow"), noise_schedule="karras"),
    _generate(
        "two noise schedules",
        (INVALID, "noise_schedule", "karras"),
        scheduler="DPM++ 2M Karras",
        noise_schedule="exponential",
    ),
    _generate("webp", format="webp", quality=80),
    _generate("gif", (INVALID, "format", "png, webp, jpeg"), format="gif"),
    _generate("an unknown resize", (INVALID, "resize", "crop, stretch, pad"), resize="squeeze"),
    _generate("no safety checker", safety_checker="off"),
    _generate("a safety checker that blocks", safety_checker="block", depends_on_worker=True),
    _generate("an unknown safety mode", (INVALID, "safety_checker", "off, flag, blur, block"), safety_checker="maybe"),
    _generate("float32", precision="float32", depends_on_worker=True),
    _generate("float8", (INVALID, "precision", "float32, float16, bfloat16"), precision="float8"),
    _generate("an unknown pipeline", (NOT_FOUND, "pipeline", "text2img"), pipeline="img2video"),
    _generate("strict", strict=True, seed=1),
]

IMAGES = [
    _generate("img2img", image=IMAGE, strength=0.5),
    _generate("img2img by name", image=IMAGE, pipeline="img2img"),
    _generate("inpaint", image=IMAGE, mask=IMAGE),
    _generate("all options of a mask", **MASKED, mask_blur=0.5, mask_fill="noise", mask_invert=True),
    _generate("only what is masked", **MASKED, only_masked=True, mask_padding=0, width_px=64, height_px=64),
    _generate("a blur of 64.5", (INVALID, "mask_blur", "0 to 64"), **MASKED, mask_blur=64.5),
    _generate("a blur of nan", (INVALID, "mask_blur", "0 to 64"), **MASKED, mask_blur=NAN),
    _generate("a blur below 0", (INVALID, "mask_blur", "0 to 64"), **MASKED, mask_blur=-1.0),
    _generate("a blur of no mask", (INVALID, "mask_blur", "no part of an image is masked"), image=IMAGE, mask_blur=4.0),
    _generate(
        "a padding of 1025", (INVALID, "mask_padding", "0 to 1024"), **MASKED, only_masked=True, mask_padding=1025
    ),
    _generate("a padding alone", (INVALID, "mask_padding", "only_masked"), **MASKED, mask_padding=8),
    _generate("only masked without mask", (INVALID, "only_masked", "no part"), image=IMAGE, only_masked=True),
    _generate(
        "an unknown fill", (INVALID, "mask_fill", "original, blurred, noise, nothing"), **MASKED, mask_fill="red"
    ),
    _generate("a fill of nothing", (INVALID, "mask_fill", "no part"), mask_fill="noise"),
    _generate("no mask to invert", (INVALID, "mask_invert", "there is none"), image=IMAGE, mask_invert=True),
    _generate("an image whose alpha is its mask", image=IMAGE, mask_from_alpha=True),
    _generate("alpha of no image", (INVALID, "image", "there is a mask for it"), mask_from_alpha=True),
    _generate("outpainting", image=IMAGE, outpaint_left_px=64, outpaint_top_px=32),
    _generate("outpainting of no image", (INVALID, "image", "there is a mask for it"), outpaint_left_px=64),
    _generate("a side of 2049", (INVALID, "outpaint_right_px", "0 to 2048"), image=IMAGE, outpaint_right_px=2049),
    _generate(
        "outpainting by img2img",
        (INVALID, "pipeline", "takes no mask"),
        image=IMAGE,
        outpaint_bottom_px=8,
        pipeline="img2img",
    ),
    _generate("a mask without image", (INVALID, "image", "there is a mask for it"), mask=IMAGE),
    _generate("img2img without image", (INVALID, "image", "starts from it"), pipeline="img2img"),
    _generate("inpaint without mask", (INVALID, "mask", "is missing"), pipeline="inpaint", image=IMAGE),
    _generate("text2img with image", (INVALID, "pipeline", "takes no image"), pipeline="text2img", image=IMAGE),
    _generate("img2img with mask", (INVALID, "pipeline", "takes no mask"), pipeline="img2img", image=IMAGE, mask=IMAGE),
    _generate("a strength without image", (INVALID, "strength", "there is none"), strength=0.5),
    _generate("a strength of 0", (INVALID, "strength", "above 0, to 1"), image=IMAGE, strength=0.0),
    _generate("a strength of 1.01", (INVALID, "strength", "above 0, to 1"), image=IMAGE, strength=1.01),
    _generate("a strength of nan", (INVALID, "strength", "above 0, to 1"), image=IMAGE, strength=NAN),
    _generate("a strength that leaves no step", (INVALID, "strength", "leaves none"), image=IMAGE, strength=0.04),
    _generate("0.8 of one step", (INVALID, "strength", "leaves none"), image=IMAGE, steps=1),
    _generate("an image without bytes", (INVALID, "image", "has no bytes"), image=ImageSource(data=b"")),
    _generate("an image without source", (INVALID, "image", "is missing"), image=ImageSource()),
    _generate(
        "an image on the web", (INVALID, "image.url", "data: URL"), image=ImageSource(url="https://example.com/a")
    ),
    _generate("a data: URL without comma", (INVALID, "image.url", "comma"), image=ImageSource(url="data:image/png")),
    _generate(
        "a data: URL that is not base64",
        (INVALID, "image.url", "base64"),
        image=ImageSource(url="data:image/png;base64,*"),
    ),
    _generate(
        "a blob without digest", (INVALID, "image.blob.digest", "sha256:"), image=ImageSource(blob=Blob(digest="a"))
    ),
    _generate(
        "a blob of a strange scope",
        (INVALID, "image.blob.scope", "1 to 63"),
        image=ImageSource(blob=Blob(scope="A B", digest=f"sha256:{'0' * 64}")),
    ),
]

CONTROLS = [
    _generate("a control image", controls=[edges(scale=0.5, start=0.1, end=0.9)], depends_on_worker=True),
    _generate("a photo and its annotator", controls=[photo()], depends_on_worker=True, is_for_gateway=True),
    _generate("9 controls", (INVALID, "controls", "9 entries"), controls=[edges()] * 9),
    _generate("a control of nothing", (INVALID, "controls[0].controlnet", "is missing"), controls=[Control()]),
    _generate(
        "a control without image",
        (INVALID, "controls[1].image", "is missing"),
        controls=[edges(), Control(controlnet="canny")],
    ),
    _generate(
        "an annotator without image",
        (INVALID, "controls[0].image", "is missing"),
        controls=[Control(annotator="canny")],
    ),
    _generate("a control with resize and mode", controls=[edges(resize="pad", mode="prompt")], depends_on_worker=True),
    _generate(
        "an unknown mode", (INVALID, "controls[0].mode", "balanced, prompt, control"), controls=[edges(mode="x")]
    ),
    _generate("a control's resize", (INVALID, "controls[0].resize", "crop, stretch"), controls=[edges(resize="fit")]),
    _generate("a scale of 2.1", (INVALID, "controls[0].scale", "0 to 2"), controls=[edges(scale=2.1)]),
    _generate("a scale of nan", (INVALID, "controls[0].scale", "0 to 2"), controls=[edges(scale=NAN)]),
    _generate("a control that ends at 1.5", (INVALID, "controls[0].end", "0 to 1"), controls=[edges(end=1.5)]),
    _generate("a control that starts below 0", (INVALID, "controls[0].start", "0 to 1"), controls=[edges(start=-0.1)]),
    _generate(
        "a control that ends as it starts",
        (INVALID, "controls[0].end", "above the start"),
        controls=[edges(start=0.5, end=0.5)],
    ),
    _generate(
        "a control that starts at the end", (INVALID, "controls[0].start", "below the end"), controls=[edges(start=1.0)]
    ),
    _generate(
        "parameters without annotator",
        (INVALID, "controls[0].parameters", "none is named"),
        controls=[with_parameters(edges(), low_threshold=1)],
    ),
    _generate(
        "a parameter of nan",
        (INVALID, "controls[0].parameters.low_threshold", "finite"),
        controls=[with_parameters(photo(), low_threshold=NAN)],
    ),
    _generate(
        "parameters of 5,000 bytes",
        (TOO_LARGE, "controls[0].parameters", "at most 4096"),
        controls=[with_parameters(photo(), mode="x" * 5000)],
    ),
    _generate(
        "a control image that was made", controls=[edges(made_by=_made_by("canny", low=1))], depends_on_worker=True
    ),
    _generate(
        "an annotator for an image that was made",
        (INVALID, "controls[0].made_by", "leave out this field or the annotator"),
        controls=[photo(made_by=_made_by("canny"))],
    ),
    _generate(
        "an annotator of 600 bytes that made it",
        (TOO_LARGE, "controls[0].made_by.annotator", "at most 512"),
        controls=[edges(made_by=_made_by("c" * 600))],
    ),
    _generate(
        "parameters of 5,000 bytes that made it",
        (TOO_LARGE, "controls[0].made_by.parameters", "at most 4096"),
        controls=[edges(made_by=_made_by("canny", mode="x" * 5000))],
    ),
    _generate(
        "parameters of 8 levels that made it", controls=[edges(made_by=_nested_made_by(8))], depends_on_worker=True
    ),
    _generate(
        "parameters of 9 levels that made it",
        (INVALID, "controls[0].made_by.parameters.deep", "at most 8"),
        controls=[edges(made_by=_nested_made_by(9))],
    ),
    _generate(
        "600 values that made it",
        (INVALID, "controls[0].made_by.parameters", "at most 512"),
        controls=[edges(made_by=_made_by("canny", many=[True] * 600))],
    ),
    _generate("controlnet without controls", (INVALID, "controls", "is missing"), pipeline="controlnet"),
    _generate(
        "text2img with control", (INVALID, "pipeline", "takes no controls"), pipeline="text2img", controls=[edges()]
    ),
    _generate(
        "controlnet with image",
        (INVALID, "pipeline", "takes no image"),
        pipeline="controlnet",
        image=IMAGE,
        controls=[edges()],
    ),
    _generate(
        "inpaint's control of image and mask",
        image=IMAGE,
        mask=IMAGE,
        controls=[Control(controlnet="inpaint")],
        depends_on_worker=True,
    ),
    _generate(
        "inpaint's control of image and mask, from noise",
        pipeline="controlnet",
        image=IMAGE,
        mask=IMAGE,
        controls=[Control(controlnet="inpaint")],
        depends_on_worker=True,
    ),
    _generate(
        "inpaint's control without mask",
        (INVALID, "controls[0].image", "is missing"),
        image=IMAGE,
        controls=[Control(controlnet="inpaint")],
    ),
]

MODELS = [
    _generate("an unknown model", model="there-is-none", depends_on_worker=True),
    _generate("a model's name of 600 bytes", (TOO_LARGE, "model", "at most 512"), model="m" * 600),
    _generate("a VAE's name of 600 bytes", (TOO_LARGE, "vae", "at most 512"), vae="v" * 600),
    _generate("a LoRA in the prompt", prompt="a cup <lora:cyanotype:0.7>", depends_on_worker=True),
    _generate("a LoRA without a name", (INVALID, "loras[0].model", "is empty"), loras=[LoraUse()]),
    _generate(
        "a LoRA's weight of 5", (INVALID, "loras[0].weight", "-4 to 4"), loras=[LoraUse(model="cyanotype", weight=5)]
    ),
    _generate(
        "a LoRA's weight of nan",
        (INVALID, "loras[0].text_encoder_weight", "-4 to 4"),
        loras=[LoraUse(model="cyanotype", text_encoder_weight=NAN)],
    ),
    _generate("a LoRA's weight of 5 in the prompt", (INVALID, "prompt", "-4 to 4"), prompt="<lora:cyanotype:5>"),
    _generate("a LoRA that is never closed", (INVALID, "prompt", "never closed"), prompt="<lora:cyanotype:1"),
    _generate(
        "a LoRA in the negative prompt",
        (INVALID, "negative_prompt", "belongs in the prompt"),
        negative_prompt="<lora:cyanotype:1>",
    ),
    _generate("17 LoRAs", (INVALID, "loras", "17 entries"), loras=[LoraUse(model="cyanotype")] * 17),
    _generate("17 LoRAs in the prompt", (INVALID, "prompt", "at most 16"), prompt="<lora:cyanotype>" * 17),
    _generate(
        "10 LoRAs and 7 in the prompt",
        (INVALID, "prompt", "17 with those listed"),
        prompt="<lora:cyanotype>" * 7,
        loras=[LoraUse(model="cyanotype")] * 10,
    ),
    _generate("a hypernetwork", (INVALID, "prompt", "not offered"), prompt="<hypernet:x:1>"),
    _generate("33 embeddings", (INVALID, "embeddings", "33 entries"), embeddings=["mint"] * 33),
    _generate("an embedding without a name", (INVALID, "embeddings[1]", "is empty"), embeddings=["mint", ""]),
]

ANNOTATIONS = [
    _annotate("an annotation"),
    _annotate("an annotation with parameters and size", parameters={"low_threshold": 50}, width_px=64, height_px=96),
    _annotate("no annotator", (INVALID, "annotator", "is missing"), annotator=""),
    _annotate("an annotator of 600 bytes", (TOO_LARGE, "annotator", "at most 512"), annotator="c" * 600),
    _annotate("no image to annotate", (INVALID, "image", "is missing"), image=None),
    _annotate("a width of 8", (INVALID, "width_px", "16 to 8192"), width_px=8, height_px=64),
    _annotate("a height of 8193", (INVALID, "height_px", "16 to 8192"), width_px=64, height_px=8193),
    _annotate("an annotation's width alone", (INVALID, "height_px", "both sides or none"), width_px=64),
    _annotate("an annotation's parameter of nan", (INVALID, "parameters.low", "finite"), parameters={"low": NAN}),
    _annotate("an annotation of 8192 x 8192", width_px=8192, height_px=8192, depends_on_worker=True),
    _annotate(
        "an annotation's 9 levels",
        (INVALID, "parameters.low", "at most 8"),
        parameters={"low": [[[[[[[[[1]]]]]]]]]},
    ),
    _annotate("an annotation's 5,000 bytes", (TOO_LARGE, "parameters", "at most 4096"), parameters={"x": "x" * 5000}),
]

CORPUS: list[Case] = [*PROMPTS, *SIZES, *NUMBERS, *CHOICES, *IMAGES, *CONTROLS, *MODELS, *ANNOTATIONS]
