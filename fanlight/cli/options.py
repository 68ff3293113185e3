"""Options that commands share, and how their values are parsed. Sends nothing."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fanlight.client.requests import Control, Lora, ParameterValue

DEFAULT_GATEWAY = "127.0.0.1:50051"

Gateway = Annotated[
    str, typer.Option("--gateway", envvar="FANLIGHT_GATEWAY", metavar="ADDRESS", help="HOST:PORT of the gateway.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]
Priority = Annotated[int, typer.Option("--priority", min=-100, max=100, help="Higher goes first.")]

NO_ANNOTATOR = "none"
SIDES, SIDE_DIGITS_LIMIT = ("left", "right", "top", "bottom"), 6
_CONTROL = re.compile(r"([^=,]*)((?:,(?:resize|mode)=[a-z]+)*)=(.*)", re.DOTALL)
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


def parse_size(text: str | None) -> tuple[int, int]:
    """Width and height of `WxH`; zeros, which leave the size unset, where there is none."""
    if text is None:
        return 0, 0
    found = _SIZE.fullmatch(text)
    if not found:
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT, such as 512x512", param_hint="--size")
    return int(found[1]), int(found[2])


def parse_sides(text: str | None) -> dict[str, int]:
    """The outpainting fields of `left=64,top=32`, by name."""
    sides = {}
    for part in (text or "").split(",") if text else ():
        side, _, pixels = part.strip().partition("=")
        if side not in SIDES or not pixels.isascii() or not pixels.isdigit() or len(pixels) > SIDE_DIGITS_LIMIT:
            raise typer.BadParameter(
                f"{part!r} is not SIDE=PIXELS, such as left=64; sides are {', '.join(SIDES)}", param_hint="--outpaint"
            )
        sides[f"outpaint_{side}_px"] = int(pixels)
    return sides


def parse_control(text: str) -> "Control":
    """`ANNOTATOR[/CONTROLNET][,resize=MODE][,mode=MODE]=IMAGE[:SCALE]`.

    With the annotator `none` the image is the control image.
    """
    from fanlight.client.requests import Control

    found = _CONTROL.fullmatch(text)
    name, more, source = found.groups() if found else ("", "", "")
    options = dict(each.split("=") for each in more.split(",")[1:])
    annotator, _, controlnet = name.partition("/")
    if not annotator or not source:
        raise typer.BadParameter(
            f"{text!r} is not ANNOTATOR=IMAGE[:SCALE], such as canny=photo.jpg:0.8", param_hint="--control"
        )
    path, scale = _split_scale(source)
    annotator = "" if annotator == NO_ANNOTATOR else annotator
    return Control(
        image=path,
        annotator=annotator,
        controlnet=controlnet,
        scale=scale,
        resize=options.get("resize", ""),
        mode=options.get("mode", ""),
    )


def parse_lora(text: str) -> "Lora":
    """`NAME[:WEIGHT]`."""
    from fanlight.client.requests import Lora

    name, colon, weight = text.rpartition(":")
    try:
        return Lora(model=name, weight=float(weight)) if colon else Lora(model=text)
    except ValueError:
        # A reference may have colons.
        return Lora(model=text)


def _split_scale(source: str) -> tuple[Path, float | None]:
    """A file name may have a colon too: the whole text is a path if such a file exists."""
    path, colon, scale = source.rpartition(":")
    if not colon or Path(source).exists():
        return Path(source), None
    try:
        return Path(path), float(scale)
    except ValueError:
        return Path(source), None


def parse_parameter(text: str) -> "tuple[str, ParameterValue]":
    """`name=value`, where the value is a number, `true`, `false`, or else a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, such as low_threshold=50", param_hint="--param")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, parsed if isinstance(parsed, bool | int | float) else value


def job_name(text: str) -> str:
    """Takes `jobs/abc` and `abc`."""
    return text if text.startswith("jobs/") else f"jobs/{text}"
