"""Builds a job's request from Python values, and checks it. Sends nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from google.protobuf.struct_pb2 import Struct

from fanlight.common.v1.common_pb2 import Blob, ImageSource
from fanlight.contract import annotation as annotation_contract
from fanlight.contract import generation as generation_contract
from fanlight.contract.generation import ScalarOptions
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest, LoraUse
from fanlight.errors import FanlightError, InvalidInput
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest

ImageInput = bytes | Path | str | Blob
ParameterValue = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What an image is conditioned on: a control image, or a photo and the annotator that makes one from it."""

    # Encoded bytes, a file's path, or a blob that the gateway has; None for a ControlNet that takes the image and mask.
    image: ImageInput | None
    # Empty: the image is a control image already.
    annotator: str = ""
    # Empty: the first one that fits the annotator and the model.
    controlnet: str = ""
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    # 0 to 2; None leaves each to the service.
    scale: float | None = None
    # Parts of the steps, 0 to 1.
    start: float | None = None
    end: float | None = None
    # `crop`, `stretch` or `pad`; empty: as the request's images are.
    resize: str = ""
    # `balanced`, `prompt` or `control`; empty leaves it to the service.
    mode: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA and its weights."""

    model: str
    # -4 to 4, on the UNet and on the text encoders; None leaves it to the service.
    weight: float | None = None
    text_encoder_weight: float | None = None


class GenerationOptions(ScalarOptions, total=False):
    """The options of a generation besides its prompt; the service chooses what is left out or None."""

    controls: Sequence[Control]
    # The image to start from, and what of it to replace: the mask's white part, or its opaque part.
    image: ImageInput | None
    mask: ImageInput | None
    loras: Sequence[Lora]
    embeddings: Sequence[str]


def generation(prompt: str, **options: Unpack[GenerationOptions]) -> GenerateRequest:
    """Reads the images' files. InvalidInput where one cannot be read or a value does not fit its field."""
    image, mask = options.pop("image", None), options.pop("mask", None)
    request = GenerateRequest(
        controls=[_control(control) for control in options.pop("controls", ())],
        loras=[_lora(lora) for lora in options.pop("loras", ())],
        embeddings=options.pop("embeddings", ()),
        image=None if image is None else to_image_source(image),
        mask=None if mask is None else to_image_source(mask),
    )
    _set(request, "prompt", prompt)
    for name, value in options.items():
        if value is not None:
            _set(request, name, value)
    return request


def _set(request: GenerateRequest, name: str, value: object) -> None:
    try:
        setattr(request, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name}: {error}") from error


def annotation(
    annotator: str,
    image: ImageInput,
    *,
    parameters: Mapping[str, ParameterValue] | None = None,
    width_px: int = 0,
    height_px: int = 0,
) -> AnnotateRequest:
    """A control image to make. InvalidInput where the image's file cannot be read."""
    return AnnotateRequest(
        annotator=annotator,
        image=to_image_source(image),
        parameters=_struct(parameters or {}),
        width_px=width_px,
        height_px=height_px,
    )


def check(request: GenerateRequest | AnnotateRequest) -> None:
    """InvalidField, NotFound or TooLarge, the same errors as the gateway's, for what no worker could do."""
    try:
        if isinstance(request, GenerateRequest):
            generation_contract.check(request)
        else:
            annotation_contract.check(request)
    except FanlightError as error:
        raise error.within("generation" if isinstance(request, GenerateRequest) else "annotation") from error


def to_image_source(source: ImageInput) -> ImageSource:
    if isinstance(source, Blob):
        return ImageSource(blob=source)
    if isinstance(source, bytes):
        return ImageSource(data=source)
    try:
        return ImageSource(data=Path(source).read_bytes())
    except OSError as error:
        raise InvalidInput(f"{source}: cannot be read: {error.strerror}") from error


def _control(control: Control) -> diffusion_pb2.Control:
    return diffusion_pb2.Control(
        image=None if control.image is None else to_image_source(control.image),
        annotator=control.annotator,
        controlnet=control.controlnet,
        parameters=_struct(control.parameters),
        scale=control.scale,
        start=control.start,
        end=control.end,
        resize=control.resize,
        mode=control.mode,
    )


def _lora(lora: Lora) -> LoraUse:
    return LoraUse(model=lora.model, weight=lora.weight, text_encoder_weight=lora.text_encoder_weight)


def _struct(values: Mapping[str, ParameterValue]) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct
