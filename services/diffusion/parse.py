"""From a GenerateRequest to a Generation: the one place where requests are checked."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from fanlight.common.v1 import common_pb2
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.generation import Control, Generation
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.entries import CheckpointEntry
from services.diffusion.schedulers import names
from services.kernel.errors import FanlightError, InvalidField, NotFound, TooLarge
from services.kernel.pictures import PictureLimits, decode_rgb

TEXT2IMG, CONTROLNET = "text2img", "controlnet"
PIPELINES = (TEXT2IMG, CONTROLNET)

DEFAULT_STEPS, STEPS_LIMIT = 20, 150
DEFAULT_GUIDANCE, GUIDANCE_LIMIT = 5.0, 30.0
CONTROLS_LIMIT = 8
CONTROL_SCALE_LIMIT = 2.0
PROMPT_CHARACTERS_LIMIT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    catalogue: Catalogue
    pixels_limit: int
    picture_limits: PictureLimits
    # Seeds for requests without one.
    random_seed: Callable[[], int]

    def parse(self, request: diffusion_pb2.GenerateRequest, *, alone: bool = False) -> Generation:
        """InvalidField, NotFound and TooLarge name the field. Decodes control images, so it may take a while."""
        checkpoint = self.catalogue.checkpoint(request.model) if request.model else self.catalogue.default()
        _check_pipeline(request)
        width_px, height_px = self._size(request, checkpoint)
        return Generation(
            checkpoint=checkpoint,
            prompt=_text(request.prompt, "prompt"),
            negative_prompt=_text(request.negative_prompt, "negative_prompt"),
            width_px=width_px,
            height_px=height_px,
            steps=_steps(request),
            guidance_scale=_guidance(request),
            scheduler=_scheduler(request.scheduler),
            seed=request.seed if request.HasField("seed") else self.random_seed(),
            controls=self._controls(request, checkpoint, (width_px, height_px)),
            preview_every_steps=request.preview_every_steps,
            alone=alone,
        )

    def _size(self, request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry) -> tuple[int, int]:
        if not request.width_px and not request.height_px:
            return checkpoint.width_px, checkpoint.height_px
        step_px = size_step_px(checkpoint)
        for field, size_px in (("width_px", request.width_px), ("height_px", request.height_px)):
            if not size_px or size_px % step_px:
                raise InvalidField(f"is {size_px}; must be a multiple of {step_px}, or both 0", field=field)
        if request.width_px * request.height_px > self.pixels_limit:
            raise TooLarge(
                f"{request.width_px} x {request.height_px} are more than the {self.pixels_limit} pixels painted here",
                field="width_px",
            )
        return request.width_px, request.height_px

    def _controls(
        self, request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry, size_px: tuple[int, int]
    ) -> tuple[Control, ...]:
        if len(request.controls) > CONTROLS_LIMIT:
            raise InvalidField(f"has {len(request.controls)} controls; at most {CONTROLS_LIMIT}", field="controls")
        controls = []
        for number, control in enumerate(request.controls):
            try:
                controls.append(self._control(control, checkpoint, size_px))
            except FanlightError as error:
                raise error.within(f"controls[{number}]") from error
        return tuple(controls)

    def _control(
        self, control: diffusion_pb2.Control, checkpoint: CheckpointEntry, size_px: tuple[int, int]
    ) -> Control:
        if not control.controlnet:
            raise InvalidField("is empty; name a ControlNet", field="controlnet")
        start = _number(control.start if control.HasField("start") else 0.0, "start", 1.0)
        end = _number(control.end if control.HasField("end") else 1.0, "end", 1.0)
        if start >= end:
            raise InvalidField(f"is {start:g}; must be below the end, {end:g}", field="start")
        return Control(
            controlnet=self.catalogue.controlnet(control.controlnet, checkpoint),
            scale=_number(control.scale if control.HasField("scale") else 1.0, "scale", CONTROL_SCALE_LIMIT),
            start=start,
            end=end,
            image=self._image(control.image, size_px),
        )

    def _image(self, picture: common_pb2.Picture, size_px: tuple[int, int]) -> Image.Image:
        """Stretched to the size with the filter that diffusers' pipelines use."""
        if picture.WhichOneof("source") in ("blob", "url"):
            raise InvalidField("must be data here; only the gateway takes a blob or a URL", field="image")
        image = decode_rgb(picture.data, field="image", limits=self.picture_limits)
        return image if image.size == size_px else image.resize(size_px, Image.Resampling.LANCZOS)


def size_step_px(checkpoint: CheckpointEntry) -> int:
    """Sides must be whole latents; how often the UNet halves them does not matter."""
    return checkpoint.shape.latent_factor


def _check_pipeline(request: diffusion_pb2.GenerateRequest) -> None:
    if request.pipeline and request.pipeline not in PIPELINES:
        raise NotFound(f"no such pipeline; there are {', '.join(PIPELINES)}", field="pipeline")
    if request.pipeline == TEXT2IMG and request.controls:
        raise InvalidField("text2img takes no controls; leave it empty or say controlnet", field="pipeline")
    if request.pipeline == CONTROLNET and not request.controls:
        raise InvalidField("is empty; the pipeline controlnet needs a control", field="controls")


def _text(text: str, field: str) -> str:
    if len(text) > PROMPT_CHARACTERS_LIMIT:
        raise TooLarge(f"has {len(text)} characters; at most {PROMPT_CHARACTERS_LIMIT}", field=field)
    return text


def _steps(request: diffusion_pb2.GenerateRequest) -> int:
    if not request.HasField("steps"):
        return DEFAULT_STEPS
    if not 1 <= request.steps <= STEPS_LIMIT:
        raise InvalidField(f"is {request.steps}; must be 1 to {STEPS_LIMIT}", field="steps")
    return request.steps


def _guidance(request: diffusion_pb2.GenerateRequest) -> float:
    if not request.HasField("guidance_scale"):
        return DEFAULT_GUIDANCE
    return _number(request.guidance_scale, "guidance_scale", GUIDANCE_LIMIT)


def _number(value: float, field: str, limit: float) -> float:
    if not math.isfinite(value) or not 0 <= value <= limit:
        raise InvalidField(f"is {value:g}; must be 0 to {limit:g}", field=field)
    return value


def _scheduler(name: str) -> str:
    if not name:
        return names.DEFAULT
    if name not in names.SCHEDULERS:
        raise NotFound(f"no such scheduler; there are {', '.join(names.SCHEDULERS)}", field="scheduler")
    return name
