"""From Python values to the messages that a job is made of. Sends nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

from google.protobuf.struct_pb2 import Struct

from fanlight.common.v1.common_pb2 import Blob, Picture
from fanlight.diffusion.v1.diffusion_pb2 import LoraUse
from fanlight.errors import InvalidInput
from fanlight.gateway.v1.gateway_pb2 import Annotation, ControlSource, Generation

PictureSource = bytes | Path | str | Blob
ParameterValue = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A picture that conditions the painting, through the annotator that makes its control image."""

    # Encoded bytes, a file's path, or a blob that the gateway has; None for a ControlNet that takes the image and mask.
    picture: PictureSource | None
    # Empty: the picture is a control image already.
    annotator: str = ""
    # Empty: the first one that fits the annotator and the model.
    controlnet: str = ""
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    # 0 to 2; None leaves each to the service.
    scale: float | None = None
    # Parts of the steps, 0 to 1.
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA to paint with."""

    model: str
    # -4 to 4, on the UNet and on the text encoders; None leaves it to the service.
    weight: float | None = None
    text_encoder_weight: float | None = None


class GenerationOptions(TypedDict, total=False):
    """What may be asked of a generation besides its prompt; what is left out or None is the service's choice."""

    model: str | None
    pipeline: str | None
    negative_prompt: str | None
    width_px: int | None
    height_px: int | None
    steps: int | None
    guidance_scale: float | None
    scheduler: str | None
    # The first picture's; the next ones count up.
    seed: int | None
    count: int | None
    preview_every_steps: int | None
    controls: Sequence[Control]
    # The picture to start from, and what of it to paint anew: the mask's white part.
    image: PictureSource | None
    mask: PictureSource | None
    strength: float | None
    resize: str | None
    guess_mode: bool | None
    loras: Sequence[Lora]
    vae: str | None
    embeddings: Sequence[str]
    clip_skip: int | None
    noise_schedule: str | None
    eta: float | None
    format: str | None
    quality: int | None
    safety_checker: str | None
    strict: bool | None


def generation(prompt: str, **options: Unpack[GenerationOptions]) -> Generation:
    """Reads the pictures' files. InvalidInput where one cannot be read or a number does not fit its field."""
    image, mask = options.pop("image", None), options.pop("mask", None)
    work = Generation(
        prompt=prompt,
        controls=[_control(control) for control in options.pop("controls", ())],
        loras=[_lora(lora) for lora in options.pop("loras", ())],
        embeddings=options.pop("embeddings", ()),
        image=None if image is None else to_picture(image),
        mask=None if mask is None else to_picture(mask),
    )
    for name, value in options.items():
        if value is not None:
            _set(work, name, value)
    return work


def _set(work: Generation, name: str, value: object) -> None:
    try:
        setattr(work, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name}: {error}") from error


def annotation(
    annotator: str,
    picture: PictureSource,
    *,
    parameters: Mapping[str, ParameterValue] | None = None,
    width_px: int = 0,
    height_px: int = 0,
) -> Annotation:
    """A control image to make. InvalidInput where the picture's file cannot be read."""
    return Annotation(
        annotator=annotator,
        picture=to_picture(picture),
        parameters=_struct(parameters or {}),
        width_px=width_px,
        height_px=height_px,
    )


def to_picture(source: PictureSource) -> Picture:
    if isinstance(source, Blob):
        return Picture(blob=source)
    if isinstance(source, bytes):
        return Picture(data=source)
    try:
        return Picture(data=Path(source).read_bytes())
    except OSError as error:
        raise InvalidInput(f"{source}: cannot be read: {error.strerror}") from error


def _control(control: Control) -> ControlSource:
    return ControlSource(
        picture=None if control.picture is None else to_picture(control.picture),
        annotator=control.annotator,
        controlnet=control.controlnet,
        parameters=_struct(control.parameters),
        scale=control.scale,
        start=control.start,
        end=control.end,
    )


def _lora(lora: Lora) -> LoraUse:
    return LoraUse(model=lora.model, weight=lora.weight, text_encoder_weight=lora.text_encoder_weight)


def _struct(values: Mapping[str, ParameterValue]) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct
