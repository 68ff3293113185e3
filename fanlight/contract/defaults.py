"""The values that a checkpoint has for options that requests leave out. No protobuf.

Does not know where they come from: workers read them from configs, cards and names, and announce them.
"""

from dataclasses import dataclass, replace

from fanlight.contract.schedulers import resolve
from fanlight.errors import InvalidField, NotFound

# Checkpoints that were distilled to few steps, by what did it.
LCM, TCD, TURBO, LIGHTNING, HYPER = "lcm", "tcd", "turbo", "lightning", "hyper"


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What is 0, None or empty is as the contract has it for all checkpoints."""

    steps: int = 0
    guidance_scale: float | None = None
    scheduler: str = ""
    noise_schedule: str = ""
    width_px: int = 0
    height_px: int = 0
    variant: str = ""
    sources: tuple[str, ...] = ()


NO_DEFAULTS = Defaults()


def with_scheduler(defaults: Defaults, scheduler: str, noise_schedule: str = "") -> Defaults:
    """With the scheduler of that name, in any spelling; unchanged where there is none that can do it."""
    if not scheduler:
        return defaults
    try:
        name, schedule = resolve(scheduler, noise_schedule)
    except (NotFound, InvalidField):
        return defaults
    return replace(defaults, scheduler=name, noise_schedule=schedule)
