"""A checkpoint's defaults in requests and among what workers announce. A request's own values always win."""

import math

from fanlight.contract.defaults import NO_DEFAULTS, Defaults, with_scheduler
from fanlight.contract.generation import strength_of
from fanlight.contract.limits import (
    DEFAULT_STEPS,
    GUIDANCE_SCALE_LIMIT,
    NAME_LIMIT_BYTES,
    STEPS_LIMIT,
    check_bytes,
    check_count,
    check_number,
    check_size,
    check_whole,
)
from fanlight.contract.schedulers import resolve
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest, GenerationDefaults
from fanlight.errors import InvalidField

SOURCES_LIMIT = 8


def read_defaults(message: GenerationDefaults, *, size_step_px: int, field: str) -> Defaults:
    """What a worker says, checked against the limits of requests: InvalidField or TooLarge names the field.

    A scheduler that this side does not know is left out: the worker may be newer. `size_step_px`: the checkpoint's.
    """
    guidance_scale = message.guidance_scale if message.HasField("guidance_scale") else None
    if guidance_scale is not None:
        check_number(guidance_scale, 0.0, GUIDANCE_SCALE_LIMIT, field=f"{field}.guidance_scale")
    check_whole(message.steps, 0, STEPS_LIMIT, field=f"{field}.steps")
    for name in ("scheduler", "noise_schedule", "variant"):
        check_bytes(getattr(message, name), NAME_LIMIT_BYTES, field=f"{field}.{name}")
    check_count(len(message.sources), SOURCES_LIMIT, field=f"{field}.sources")
    for index, source in enumerate(message.sources):
        check_bytes(source, NAME_LIMIT_BYTES, field=f"{field}.sources[{index}]")
    _check_sides(message, size_step_px, field)
    found = Defaults(
        steps=message.steps,
        guidance_scale=guidance_scale,
        width_px=message.width_px,
        height_px=message.height_px,
        variant=message.variant,
        sources=tuple(message.sources),
    )
    return with_scheduler(found, message.scheduler, message.noise_schedule)


def _check_sides(message: GenerationDefaults, step_px: int, field: str) -> None:
    try:
        check_size(message.width_px, message.height_px, step_px)
    except InvalidField as error:
        raise error.within(field) from error


def defaults_to_proto(defaults: Defaults) -> GenerationDefaults:
    return GenerationDefaults(
        steps=defaults.steps,
        guidance_scale=defaults.guidance_scale,
        scheduler=defaults.scheduler,
        noise_schedule=defaults.noise_schedule,
        width_px=defaults.width_px,
        height_px=defaults.height_px,
        variant=defaults.variant,
        sources=defaults.sources,
    )


def missing(request: GenerateRequest, defaults: Defaults) -> GenerateRequest:
    """What the request leaves out and the checkpoint has, to be merged into the request; without a size.

    A noise schedule alone keeps its meaning: the default scheduler is taken only where it can follow it.
    """
    found = GenerateRequest()
    if defaults.steps and not request.HasField("steps"):
        found.steps = _steps(request, defaults.steps)
    if defaults.guidance_scale is not None and not request.HasField("guidance_scale"):
        found.guidance_scale = defaults.guidance_scale
    if defaults.scheduler and not request.scheduler.strip():
        schedule = request.noise_schedule or defaults.noise_schedule
        if with_scheduler(NO_DEFAULTS, defaults.scheduler, schedule).scheduler:
            found.scheduler, found.noise_schedule = resolve(defaults.scheduler, schedule)
    return found


def _steps(request: GenerateRequest, steps: int) -> int:
    """As many as leave at least one of them to an image to start from."""
    strength = strength_of(request)
    if not strength:
        return steps
    least = max(1, math.floor(1 / strength))
    while least < DEFAULT_STEPS and int(least * strength) < 1:
        least += 1
    return min(max(steps, least), STEPS_LIMIT)
