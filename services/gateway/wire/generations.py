"""A generation as a client asks for it: its fields checked, model, pipeline and ControlNets resolved."""

import re
from typing import Literal

from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.new_job import NewControl, NewGeneration, Picture
from services.gateway.jobs.model import DIFFUSION, PREPROCESS
from services.gateway.jobs.workers import Catalog, Model
from services.gateway.wire import fields, painting, parameters
from services.gateway.wire.catalog import annotator_of, checkpoint_of, controlnet_of, names, require_stage
from services.gateway.wire.pictures import picture
from services.kernel.errors import InvalidField, NotFound

PROMPT_LIMIT_BYTES = 32_000
NAME_LIMIT_BYTES = 512
STEPS_LIMIT = 150
COUNT_LIMIT = 32
CONTROLS_LIMIT = 8
GUIDANCE_LIMIT = 30.0
SCALE_LIMIT = 2.0
MIN_SIDE_PX, MAX_SIDE_PX = 64, 2048
# For a model that does not say.
SIZE_STEP_PX = 8

# By whether there is an image to start from, a mask, and a control.
_PIPELINES = {
    (False, False, False): "text2img",
    (False, False, True): "controlnet",
    (True, False, False): "img2img",
    (True, False, True): "controlnet_img2img",
    (True, True, False): "inpaint",
    (True, True, True): "controlnet_inpaint",
}

# A scheduler by its class name in diffusers, which the worker knows or not.
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9]{0,80}Scheduler")


def new_generation(message: gateway_pb2.Generation, catalog: Catalog) -> NewGeneration:
    require_stage(catalog, DIFFUSION)
    fields.text(message.model, NAME_LIMIT_BYTES, field="generation.model")
    model = checkpoint_of(catalog, message.model, field="generation.model")
    width_px, height_px = _size(message, model)
    fields.text(message.prompt, PROMPT_LIMIT_BYTES, field="generation.prompt")
    fields.whole(message.preview_every_steps, 0, STEPS_LIMIT, field="generation.preview_every_steps")
    options = painting.options(message, catalog, model)
    return NewGeneration(
        model=model.id,
        pipeline=_pipeline(message, model),
        prompt=painting.prompt_of(message, catalog, model),
        negative_prompt=fields.text(message.negative_prompt, PROMPT_LIMIT_BYTES, field="generation.negative_prompt"),
        width_px=width_px,
        height_px=height_px,
        steps=_steps(message),
        guidance_scale=_guidance(message),
        scheduler=_scheduler(message.scheduler, model),
        seed=message.seed if message.HasField("seed") else None,
        count=fields.whole(message.count, 1, COUNT_LIMIT, field="generation.count") if message.HasField("count") else 1,
        controls=_controls(message, catalog, model),
        preview_every_steps=message.preview_every_steps,
        image=_start(message, "image"),
        mask=_start(message, "mask"),
        options=options,
        words=painting.words(message, options.embeddings, catalog, model),
    )


def _start(message: gateway_pb2.Generation, name: Literal["image", "mask"]) -> Picture | None:
    return picture(getattr(message, name), field=f"generation.{name}") if message.HasField(name) else None


def _size(message: gateway_pb2.Generation, model: Model) -> tuple[int, int]:
    """The model's own where none is asked for; both 0 where the model does not say, and where the image tells."""
    width_px, height_px = message.width_px, message.height_px
    if not width_px and not height_px:
        return (0, 0) if message.HasField("image") else (model.width_px, model.height_px)
    step_px = model.size_step_px or SIZE_STEP_PX
    for name, side_px in (("width_px", width_px), ("height_px", height_px)):
        field = f"generation.{name}"
        if not side_px:
            raise InvalidField("is missing: give both sides or none", field=field)
        if not MIN_SIDE_PX <= side_px <= MAX_SIDE_PX or side_px % step_px:
            raise InvalidField(
                f"is {side_px}; must be {MIN_SIDE_PX} to {MAX_SIDE_PX} and a multiple of {step_px}", field=field
            )
    return width_px, height_px


def _steps(message: gateway_pb2.Generation) -> int | None:
    if not message.HasField("steps"):
        return None
    return fields.whole(message.steps, 1, STEPS_LIMIT, field="generation.steps")


def _guidance(message: gateway_pb2.Generation) -> float | None:
    if not message.HasField("guidance_scale"):
        return None
    return fields.number(message.guidance_scale, 0.0, GUIDANCE_LIMIT, field="generation.guidance_scale")


def _pipeline(message: gateway_pb2.Generation, model: Model) -> str:
    has = (message.HasField("image"), message.HasField("mask"), bool(message.controls))
    if has[1] and not has[0]:
        raise InvalidField("is missing, and there is a mask for it", field="generation.image")
    pipeline = message.pipeline or _PIPELINES[has]
    known = model.pipelines or tuple(_PIPELINES.values())
    if pipeline not in known:
        raise NotFound(
            f"{model.id} has no pipeline {pipeline[:80]!r}; it has {', '.join(known)}", field="generation.pipeline"
        )
    wanted = next(parts for parts, name in _PIPELINES.items() if name == pipeline)
    for name, is_there, is_wanted in zip(("image", "mask", "controls"), has, wanted, strict=True):
        if is_wanted and not is_there:
            raise InvalidField(f"is missing; the pipeline {pipeline} needs it", field=f"generation.{name}")
        if is_there and not is_wanted:
            raise InvalidField(f"{pipeline} takes no {name}; leave the pipeline out", field="generation.pipeline")
    return pipeline


def _scheduler(name: str, model: Model) -> str:
    fields.text(name, NAME_LIMIT_BYTES, field="generation.scheduler")
    if name and model.schedulers and name not in model.schedulers and not _CLASS_NAME.fullmatch(name):
        raise NotFound(f"there is no such scheduler; there are {names(model.schedulers)}", field="generation.scheduler")
    return name


def _controls(message: gateway_pb2.Generation, catalog: Catalog, model: Model) -> tuple[NewControl, ...]:
    if len(message.controls) > CONTROLS_LIMIT:
        raise InvalidField(
            f"has {len(message.controls)} entries; at most {CONTROLS_LIMIT}", field="generation.controls"
        )
    return tuple(
        _control(control, catalog, model, f"generation.controls[{i}]", has_mask=message.HasField("mask"))
        for i, control in enumerate(message.controls)
    )


def _control(
    message: gateway_pb2.ControlSource, catalog: Catalog, model: Model, field: str, *, has_mask: bool
) -> NewControl:
    annotator = None
    given = "{}"
    if message.annotator:
        require_stage(catalog, PREPROCESS)
        annotator = annotator_of(catalog, message.annotator, field=f"{field}.annotator")
        given = parameters.given(message.parameters, annotator, field=f"{field}.parameters")
    elif message.parameters.fields:
        raise InvalidField("are for an annotator, and none is named", field=f"{field}.parameters")
    start, end = _range(message, field)
    return NewControl(
        picture=_control_picture(message, field, is_made=has_mask),
        annotator=annotator.id if annotator else "",
        parameters=given,
        controlnet=controlnet_of(catalog, message.controlnet, annotator, model, field=f"{field}.controlnet"),
        scale=_scale(message, field),
        start=start,
        end=end,
    )


def _control_picture(message: gateway_pb2.ControlSource, field: str, *, is_made: bool) -> Picture | None:
    """None where the worker makes the control image of the generation's own image and mask."""
    if is_made and not message.annotator and not message.HasField("picture"):
        return None
    return picture(message.picture, field=f"{field}.picture")


def _scale(message: gateway_pb2.ControlSource, field: str) -> float | None:
    if not message.HasField("scale"):
        return None
    return fields.number(message.scale, 0.0, SCALE_LIMIT, field=f"{field}.scale")


def _range(message: gateway_pb2.ControlSource, field: str) -> tuple[float | None, float | None]:
    start = fields.number(message.start, 0.0, 1.0, field=f"{field}.start") if message.HasField("start") else None
    end = fields.number(message.end, 0.0, 1.0, field=f"{field}.end") if message.HasField("end") else None
    if (start or 0.0) >= (1.0 if end is None else end):
        raise InvalidField("must be after start", field=f"{field}.end")
    return start, end
