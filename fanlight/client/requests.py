"""From Python values to the messages that a job is made of. Sends nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, Unpack

from google.protobuf.struct_pb2 import Struct

from fanlight.common.v1.common_pb2 import Blob, Picture
from fanlight.errors import InvalidInput
from fanlight.gateway.v1.gateway_pb2 import Annotation, ControlSource, Generation

PictureSource = bytes | Path | str | Blob
ParameterValue = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A picture that conditions the painting, through the annotator that makes its control image."""

    # Encoded bytes, a file's path, or a blob that the gateway has.
    picture: PictureSource
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


def generation(prompt: str, **options: Unpack[GenerationOptions]) -> Generation:
    """Reads the controls' files. InvalidInput where one cannot be read or a number does not fit its field."""
    work = Generation(prompt=prompt, controls=[_control(control) for control in options.pop("controls", ())])
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
        picture=to_picture(control.picture),
        annotator=control.annotator,
        controlnet=control.controlnet,
        parameters=_struct(control.parameters),
        scale=control.scale,
        start=control.start,
        end=control.end,
    )


def _struct(values: Mapping[str, ParameterValue]) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct
