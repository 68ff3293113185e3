"""Checks a GenerateRequest as far as that needs no worker and no model, and gives the values of its defaults.

The client calls it before it sends anything, the gateway before a job exists, a worker before it decodes an image.
Fields in errors are relative to the request, such as `controls[0].end`.
"""

from collections.abc import Callable, Mapping

from fanlight.contract.annotation import check_struct
from fanlight.contract.images import check_source, images_of
from fanlight.contract.limits import (
    CLIP_SKIP_LIMIT,
    CONTROL_SCALE_LIMIT,
    CONTROLS_LIMIT,
    COUNT_LIMIT,
    DEFAULT_CONTROL_END,
    DEFAULT_CONTROL_START,
    DEFAULT_COUNT,
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_IMG2IMG_STRENGTH,
    DEFAULT_INPAINT_STRENGTH,
    DEFAULT_LORA_WEIGHT,
    DEFAULT_STEPS,
    DRAWN_SEED_LIMIT,
    EMBEDDINGS_LIMIT,
    ETA_LIMIT,
    GUIDANCE_SCALE_LIMIT,
    LORA_WEIGHT_LIMIT,
    LORAS_LIMIT,
    NAME_LIMIT_BYTES,
    PART_TOKENS,
    PROMPT_ENCODED_PARTS_LIMIT,
    QUALITY_LIMIT,
    SEED_LIMIT,
    STEPS_LIMIT,
    check_bytes,
    check_choice,
    check_count,
    check_number,
    check_size,
    check_whole,
    format_number,
)
from fanlight.contract.masks import MaskOptions, check_mask_options, has_mask
from fanlight.contract.prompt import (
    EMPHASES,
    ORIGINAL,
    STRICT,
    SYNTAXES,
    ParsedPrompt,
    PromptSize,
    check_prompt,
    parse_prompt,
)
from fanlight.contract.schedulers import resolve
from fanlight.contract.warnings import bounded_warnings
from fanlight.diffusion.v1.diffusion_pb2 import Control, GenerateRequest, LoraUse
from fanlight.errors import FanlightError, InvalidField, NotFound

# By whether there is an image to start from, a mask, and a control.
_PIPELINES: Mapping[tuple[bool, bool, bool], str] = {
    (False, False, False): "text2img",
    (True, False, False): "img2img",
    (True, True, False): "inpaint",
    (False, False, True): "controlnet",
    (True, False, True): "controlnet_img2img",
    (True, True, True): "controlnet_inpaint",
}
PIPELINES = tuple(_PIPELINES.values())
STARTS_FROM_IMAGE = frozenset(name for (image, _, _), name in _PIPELINES.items() if image)
HAS_MASK = frozenset(name for (_, mask, _), name in _PIPELINES.items() if mask)
HAS_CONTROLS = frozenset(name for (_, _, controls), name in _PIPELINES.items() if controls)

RESIZES = ("crop", "stretch", "pad")
CONTROL_MODES = ("balanced", "prompt", "control")
FORMATS = ("png", "webp", "jpeg")
# No safety checker, or what happens to images that it flags.
OFF = "off"
SAFETY_MODES = (OFF, "flag", "blur", "block")
PRECISIONS = ("float32", "float16", "bfloat16")

# The ControlNet whose control image is made from the request's own image and mask.
INPAINT_CONTROLNET = "inpaint"


class ScalarOptions(MaskOptions, total=False):
    """The options that are single values, by their field names; None leaves one unset."""

    model: str | None
    pipeline: str | None
    negative_prompt: str | None
    width_px: int | None
    height_px: int | None
    steps: int | None
    guidance_scale: float | None
    scheduler: str | None
    noise_schedule: str | None
    eta: float | None
    # The first image's; the next ones count up, unless a variation strength is set.
    seed: int | None
    count: int | None
    # A second seed, whose noise is mixed in by the strength, 0 to 1; it counts up from image to image.
    variation_seed: int | None
    variation_strength: float | None
    preview_every_steps: int | None
    strength: float | None
    resize: str | None
    guess_mode: bool | None
    vae: str | None
    clip_skip: int | None
    format: str | None
    quality: int | None
    safety_checker: str | None
    strict: bool | None
    # The number type that the UNet must compute in.
    precision: str | None
    # How prompts are read: strict, a1111 or plain.
    prompt_syntax: str | None
    # What the weights of prompts do: original, no_norm, ignore or none.
    emphasis: str | None
    # SDXL's own, counted as ComfyUI does: 2 is the layer that it was trained with.
    sdxl_clip_skip: int | None


def check(request: GenerateRequest) -> None:
    """InvalidField, NotFound or TooLarge about the first field that no worker could accept."""
    _check_names(request)
    check_choice(request.prompt_syntax, SYNTAXES, field="prompt_syntax")
    check_choice(request.emphasis, EMPHASES, field="emphasis")
    _check_prompts(request)
    check_size(request.width_px, request.height_px)
    _check_numbers(request)
    _check_choices(request)
    resolve(request.scheduler, request.noise_schedule)
    for path, image in images_of(request):
        check_source(image, path)
    _check_loras(request)
    _check_embeddings(request)
    check_count(len(request.controls), CONTROLS_LIMIT, field="controls")
    for index, control in enumerate(request.controls):
        try:
            _check_control(control, request)
        except FanlightError as error:
            raise error.within(f"controls[{index}]") from error
    _check_pipeline(request)
    check_mask_options(request, is_masked=pipeline_of(request) in HAS_MASK)
    _check_strength(request)
    _check_variation(request)


def warnings_of(request: GenerateRequest) -> tuple[str, ...]:
    """What of a request that `check` accepts is read otherwise than it may have been meant, in sentences."""
    said = []
    for field, prompt in parsed_prompts(request).items():
        said += [f"{field}: {warning}" for warning in prompt.warnings]
        said += _late_changes(request, field, prompt)
        if field == "negative_prompt":
            said += [f"{field}: the LoRA {tag.name} is left out; it belongs in the prompt" for tag in prompt.loras]
    return bounded_warnings(said)


def _late_changes(request: GenerateRequest, field: str, prompt: ParsedPrompt) -> list[str]:
    """About a text that no step has: as in A1111 the steps of an image to start from are counted from its first one."""
    steps, strength = steps_of(request), strength_of(request)
    count = steps if strength is None else min(int(steps * strength), steps)
    if late := prompt.unreached(steps, count):
        return [f"{field}: the change at step {late} never comes, because {count} of {steps} steps run"]
    if wheres := prompt.outside(steps):
        return [f"{field}: the change at {wheres[0]} is outside the {steps} steps and never comes"]
    return []


def check_one_image(request: GenerateRequest) -> None:
    """What a worker requires beyond `check`: one image, and the images themselves. InvalidField."""
    if count_of(request) > 1:
        raise InvalidField(
            f"is {request.count}; a worker makes one image per call; the gateway accepts several", field="count"
        )
    for index, control in enumerate(request.controls):
        if control.annotator:
            raise InvalidField(
                "is for the gateway; a diffusion worker takes the control image itself",
                field=f"controls[{index}].annotator",
            )
    for path, image in images_of(request):
        if image.HasField("blob"):
            raise InvalidField("must be data or a data: URL here; only the gateway takes a blob", field=path)


def check_resolved(request: GenerateRequest) -> None:
    """Checks, once ControlNets are named by their ids, that those that need a control image have one. InvalidField."""
    for index, control in enumerate(request.controls):
        if not control.HasField("image") and not control.annotator and control.controlnet != INPAINT_CONTROLNET:
            raise InvalidField(
                f"is missing; the ControlNet {control.controlnet} conditions on an image",
                field=f"controls[{index}].image",
            )


def syntax_of(request: GenerateRequest) -> str:
    """How the prompts are read, one of SYNTAXES."""
    return request.prompt_syntax or STRICT


def parsed_prompts(request: GenerateRequest) -> dict[str, ParsedPrompt]:
    """The prompt and the negative prompt, by field. InvalidField for one that cannot be read."""
    syntax = syntax_of(request)
    return {
        "prompt": parse_prompt(request.prompt, "prompt", syntax),
        "negative_prompt": parse_prompt(request.negative_prompt, "negative_prompt", syntax),
    }


def predictions_of(request: GenerateRequest) -> int:
    """How often the model predicts noise in each step: for each prompt between ANDs, and with guidance once more."""
    return len(parsed_prompts(request)["prompt"].prompts) + is_guided(request)


def pipeline_of(request: GenerateRequest) -> str:
    """The pipeline that the request names, or the one of PIPELINES for what it has."""
    if request.pipeline:
        return request.pipeline
    is_masked = has_mask(request)
    return _PIPELINES[is_masked or request.HasField("image"), is_masked, bool(request.controls)]


def steps_of(request: GenerateRequest) -> int:
    """Model steps, 1 to 150."""
    return request.steps if request.HasField("steps") else DEFAULT_STEPS


def guidance_of(request: GenerateRequest) -> float:
    """Scale of classifier-free guidance, 0 to 30."""
    return request.guidance_scale if request.HasField("guidance_scale") else DEFAULT_GUIDANCE_SCALE


def is_guided(request: GenerateRequest) -> bool:
    """Whether each step also predicts noise for the negative prompt; a scale of 1 and below means not."""
    return guidance_of(request) > 1


def strength_of(request: GenerateRequest) -> float | None:
    """How much of the image is replaced, above 0 to 1; None for a pipeline that does not start from an image."""
    pipeline = pipeline_of(request)
    if pipeline not in STARTS_FROM_IMAGE:
        return None
    if request.HasField("strength"):
        return request.strength
    return DEFAULT_INPAINT_STRENGTH if pipeline in HAS_MASK else DEFAULT_IMG2IMG_STRENGTH


def count_of(request: GenerateRequest) -> int:
    """How many images, 1 to 32."""
    return request.count if request.HasField("count") else DEFAULT_COUNT


def lora_weights(request: GenerateRequest) -> dict[str, tuple[float, float]]:
    """By LoRA, its weights on the UNet and on the text encoders: those of `loras` and of prompt tags, added up.

    Names are compared as they are written. InvalidField for a prompt that cannot be read.
    """
    weights: dict[str, tuple[float, float]] = {}
    listed = [(use.model, *_weights(use)) for use in request.loras]
    tagged = [(tag.name, tag.unet_weight, tag.text_weight) for tag in parsed_prompts(request)["prompt"].loras]
    for name, unet, text in [*listed, *tagged]:
        others = weights.get(name, (0.0, 0.0))
        weights[name] = (others[0] + unet, others[1] + text)
    return weights


def split(request: GenerateRequest, draw: Callable[[], int]) -> list[GenerateRequest]:
    """One small message per image, to be merged over the request: `count` 1, its seed, and its variation seed.

    As in A1111 the seed counts up, or with a variation strength above 0 it stays and the variation seed counts up.
    `draw` gives a random number of 32 bits, for a seed that is unset.
    """
    is_varied = request.variation_strength > 0
    seed, seed_limit = _first(request, "seed", draw)
    variation, variation_limit = _first(request, "variation_seed", draw) if is_varied else (0, SEED_LIMIT)
    patches = []
    for index in range(count_of(request)):
        patch = GenerateRequest(count=1, seed=seed if is_varied else (seed + index) % seed_limit)
        if is_varied:
            patch.variation_seed = (variation + index) % variation_limit
        patches.append(patch)
    return patches


def _first(request: GenerateRequest, name: str, draw: Callable[[], int]) -> tuple[int, int]:
    """The first image's seed, and the number of seeds that it counts up among."""
    if request.HasField(name):  # type: ignore[arg-type]  # one of two literals
        return getattr(request, name), SEED_LIMIT
    return draw() % DRAWN_SEED_LIMIT, DRAWN_SEED_LIMIT


def _weights(use: LoraUse) -> tuple[float, float]:
    unet = use.weight if use.HasField("weight") else DEFAULT_LORA_WEIGHT
    return unet, use.text_encoder_weight if use.HasField("text_encoder_weight") else unet


def _check_names(request: GenerateRequest) -> None:
    for field in ("model", "vae", "scheduler"):
        check_bytes(getattr(request, field), NAME_LIMIT_BYTES, field=field)


def _check_prompts(request: GenerateRequest) -> None:
    sizes = {
        field: check_prompt(
            getattr(request, field),
            field,
            syntax_of(request),
            emphasis=request.emphasis or ORIGINAL,
            steps=steps_of(request),
        )
        for field in ("prompt", "negative_prompt")
    }
    _check_encoded(sizes)
    prompt, negative = parsed_prompts(request).values()
    if negative.loras and syntax_of(request) == STRICT:
        at = negative.loras[0].at + 1
        raise InvalidField(f"character {at}: a LoRA belongs in the prompt", field="negative_prompt")
    for tag in prompt.loras:
        check_bytes(tag.name, NAME_LIMIT_BYTES, field="prompt")
    tagged, listed = len(prompt.loras), len(request.loras)
    if tagged and listed <= LORAS_LIMIT < tagged + listed:
        raise InvalidField(
            f"names {tagged} LoRAs, {tagged + listed} with those listed; at most {LORAS_LIMIT} are taken",
            field="prompt",
        )


def _check_encoded(sizes: Mapping[str, PromptSize]) -> None:
    """InvalidField where the texts of both prompts, each filled up to the longest, are too many parts."""
    texts, parts = sum(size.texts for size in sizes.values()), max(size.parts for size in sizes.values())
    if texts * parts > PROMPT_ENCODED_PARTS_LIMIT:
        raise InvalidField(
            f"changes or is composed of several texts, {texts} with those of the other prompt, which may fill {parts}"
            f" parts of {PART_TOKENS} tokens each; at most {PROMPT_ENCODED_PARTS_LIMIT} in all are taken",
            field=max(sizes, key=lambda field: sizes[field].texts),
        )


def _check_numbers(request: GenerateRequest) -> None:
    whole = {
        "steps": STEPS_LIMIT,
        "clip_skip": CLIP_SKIP_LIMIT,
        "sdxl_clip_skip": CLIP_SKIP_LIMIT,
        "quality": QUALITY_LIMIT,
        "count": COUNT_LIMIT,
    }
    for field, limit in whole.items():
        if request.HasField(field):  # type: ignore[arg-type]  # names of optional fields
            check_whole(getattr(request, field), 1, limit, field=field)
    numbers = {"guidance_scale": GUIDANCE_SCALE_LIMIT, "eta": ETA_LIMIT, "variation_strength": 1.0}
    for field, most in numbers.items():
        check_number(getattr(request, field), 0.0, most, field=field)
    check_whole(request.preview_every_steps, 0, STEPS_LIMIT, field="preview_every_steps")


def _check_choices(request: GenerateRequest) -> None:
    check_choice(request.resize, RESIZES, field="resize")
    check_choice(request.format, FORMATS, field="format")
    check_choice(request.safety_checker, SAFETY_MODES, field="safety_checker")
    check_choice(request.precision, PRECISIONS, field="precision")
    if request.pipeline and request.pipeline not in PIPELINES:
        raise NotFound(
            f"there is no pipeline {request.pipeline[:80]!r}; there are {', '.join(PIPELINES)}", field="pipeline"
        )


def _check_loras(request: GenerateRequest) -> None:
    check_count(len(request.loras), LORAS_LIMIT, field="loras")
    for index, use in enumerate(request.loras):
        _check_named(use.model, "a LoRA", f"loras[{index}].model")
        for field in ("weight", "text_encoder_weight"):
            weight = getattr(use, field)
            check_number(weight, -LORA_WEIGHT_LIMIT, LORA_WEIGHT_LIMIT, field=f"loras[{index}].{field}")


def _check_embeddings(request: GenerateRequest) -> None:
    check_count(len(request.embeddings), EMBEDDINGS_LIMIT, field="embeddings")
    for index, name in enumerate(request.embeddings):
        _check_named(name, "an embedding", f"embeddings[{index}]")


def _check_named(name: str, what: str, field: str) -> None:
    if not name:
        raise InvalidField(f"is empty; name {what}", field=field)
    check_bytes(name, NAME_LIMIT_BYTES, field=field)


def _check_control(control: Control, request: GenerateRequest) -> None:
    """Fields in errors are relative to the control."""
    check_bytes(control.controlnet, NAME_LIMIT_BYTES, field="controlnet")
    check_bytes(control.annotator, NAME_LIMIT_BYTES, field="annotator")
    if not control.controlnet and not control.annotator:
        raise InvalidField("is missing, and there is no annotator to choose one for", field="controlnet")
    check_number(control.scale, 0.0, CONTROL_SCALE_LIMIT, field="scale")
    check_choice(control.resize, RESIZES, field="resize")
    check_choice(control.mode, CONTROL_MODES, field="mode")
    _check_range(control)
    _check_annotator(control)
    if not control.HasField("image") and not _makes_its_image(control, request):
        raise InvalidField("is missing; a ControlNet conditions on an image", field="image")


def _check_range(control: Control) -> None:
    check_number(control.start, 0.0, 1.0, field="start")
    check_number(control.end, 0.0, 1.0, field="end")
    start = control.start if control.HasField("start") else DEFAULT_CONTROL_START
    end = control.end if control.HasField("end") else DEFAULT_CONTROL_END
    if start >= end:
        field = "end" if control.HasField("end") else "start"
        order = f"above the start, {format_number(start)}" if field == "end" else f"below the end, {format_number(end)}"
        raise InvalidField(f"is {format_number(getattr(control, field))}; must be {order}", field=field)


def _check_annotator(control: Control) -> None:
    """Checks the annotator that makes the control image, or that made it."""
    if not control.annotator and control.parameters.fields:
        raise InvalidField("are for an annotator, and none is named", field="parameters")
    check_struct(control.parameters, field="parameters")
    if control.annotator and control.HasField("made_by"):
        raise InvalidField(
            "is only for a finished control image; leave out this field or the annotator", field="made_by"
        )
    check_bytes(control.made_by.annotator, NAME_LIMIT_BYTES, field="made_by.annotator")
    check_struct(control.made_by.parameters, field="made_by.parameters")


def _makes_its_image(control: Control, request: GenerateRequest) -> bool:
    """Whether its control image may be made from the request's image and mask. The ControlNet may still be an alias."""
    return (
        INPAINT_CONTROLNET in control.controlnet.lower()
        and not control.annotator
        and request.HasField("image")
        and has_mask(request)
    )


def _check_pipeline(request: GenerateRequest) -> None:
    if has_mask(request) and not request.HasField("image"):
        raise InvalidField("is missing, and there is a mask for it", field="image")
    pipeline = pipeline_of(request)
    if pipeline in STARTS_FROM_IMAGE and not request.HasField("image"):
        raise InvalidField(f"is missing; the pipeline {pipeline} starts from it", field="image")
    if pipeline in HAS_MASK and not has_mask(request):
        raise InvalidField(f"is missing; the pipeline {pipeline} replaces what is white in it", field="mask")
    if pipeline in HAS_CONTROLS and not request.controls:
        raise InvalidField(f"is missing; the pipeline {pipeline} needs one", field="controls")
    if pipeline not in HAS_CONTROLS and request.controls:
        raise InvalidField(f"{pipeline} takes no controls; leave the pipeline out", field="pipeline")
    # The ControlNet `inpaint` uses both, whatever the pipeline does.
    if not any(INPAINT_CONTROLNET in control.controlnet.lower() for control in request.controls):
        given = {"image": request.HasField("image"), "mask": has_mask(request)}
        for field, pipelines in (("image", STARTS_FROM_IMAGE), ("mask", HAS_MASK)):
            if pipeline not in pipelines and given[field]:
                raise InvalidField(f"{pipeline} takes no {field}; leave the pipeline out", field="pipeline")


def _check_strength(request: GenerateRequest) -> None:
    strength = strength_of(request)
    if strength is None:
        if request.HasField("strength"):
            raise InvalidField("is for an image to start from, and there is none", field="strength")
        return
    if not 0 < strength <= 1:
        raise InvalidField(f"is {format_number(strength)}; must be above 0, to 1", field="strength")
    if int(steps_of(request) * strength) < 1:
        raise InvalidField(
            f"is {format_number(strength)}; of {steps_of(request)} steps that leaves none", field="strength"
        )


def _check_variation(request: GenerateRequest) -> None:
    if request.HasField("variation_seed") and not request.HasField("variation_strength"):
        raise InvalidField(
            "is missing, and there is a variation seed, which changes nothing without it", field="variation_strength"
        )
