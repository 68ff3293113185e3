"""Single fields of a request: their limits, and what stands for those that are left open."""

import math
from enum import StrEnum
from typing import TypeVar

from fanlight.diffusion.v1 import diffusion_pb2
from services.kernel.errors import InvalidField, NotFound, TooLarge

DEFAULT_STEPS, STEPS_LIMIT = 20, 150
DEFAULT_GUIDANCE, GUIDANCE_LIMIT = 5.0, 30.0
DEFAULT_QUALITY = 90
CLIP_SKIP_LIMIT = 12
PROMPT_CHARACTERS_LIMIT = 10_000

Choice = TypeVar("Choice", bound=StrEnum)


def text(value: str, field: str) -> str:
    if len(value) > PROMPT_CHARACTERS_LIMIT:
        raise TooLarge(f"has {len(value)} characters; at most {PROMPT_CHARACTERS_LIMIT}", field=field)
    return value


def number(value: float, field: str, limit: float, *, lowest: float = 0.0) -> float:
    if not math.isfinite(value) or not lowest <= value <= limit:
        raise InvalidField(f"is {value:g}; must be {lowest:g} to {limit:g}", field=field)
    return value


def whole(value: int, field: str, limit: int) -> int:
    if not 1 <= value <= limit:
        raise InvalidField(f"is {value}; must be 1 to {limit}", field=field)
    return value


def choice(value: str, choices: type[Choice], default: Choice, field: str) -> Choice:
    if not value:
        return default
    try:
        return choices(value)
    except ValueError as error:
        raise NotFound(f"no such {field}; there are {', '.join(choices)}", field=field) from error


def steps(request: diffusion_pb2.GenerateRequest) -> int:
    return whole(request.steps, "steps", STEPS_LIMIT) if request.HasField("steps") else DEFAULT_STEPS


def guidance(request: diffusion_pb2.GenerateRequest) -> float:
    if not request.HasField("guidance_scale"):
        return DEFAULT_GUIDANCE
    return number(request.guidance_scale, "guidance_scale", GUIDANCE_LIMIT)


def quality(request: diffusion_pb2.GenerateRequest) -> int:
    return whole(request.quality, "quality", 100) if request.HasField("quality") else DEFAULT_QUALITY


def preview_every(request: diffusion_pb2.GenerateRequest) -> int:
    every: int = request.preview_every_steps
    return whole(every, "preview_every_steps", STEPS_LIMIT) if every else 0


def eta(request: diffusion_pb2.GenerateRequest) -> float:
    return number(request.eta, "eta", 1.0) if request.HasField("eta") else 0.0
