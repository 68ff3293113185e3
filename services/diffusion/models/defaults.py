"""The values that a checkpoint gives to options that a request leaves out. Reads small files; loads no torch.

Later ones go before earlier ones: the family; the kind, by its configs, by what is said beside the file or in its
header, or by its name; what its card says in numbers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fanlight.contract.defaults import HYPER, LCM, LIGHTNING, NO_DEFAULTS, TCD, TURBO, Defaults, with_scheduler
from fanlight.contract.limits import (
    DEFAULT_SIZE_STEP_PX,
    GUIDANCE_SCALE_LIMIT,
    SIDE_MAX_PX,
    SIDE_MIN_PX,
    STEPS_LIMIT,
)
from fanlight.contract.schedulers import SGM_UNIFORM
from services.diffusion.models.cards import card_files, card_of, header_metadata
from services.diffusion.models.entries import CheckpointEntry

# A1111's guidance for SD 1 and 2; diffusers' guidance and scheduler for SDXL.
_FAMILIES: Mapping[str, Defaults] = {
    "sd1": Defaults(guidance_scale=7.0),
    "sd2": Defaults(guidance_scale=7.0),
    "sdxl": Defaults(guidance_scale=5.0, scheduler="euler"),
    "refiner": Defaults(guidance_scale=5.0, scheduler="euler"),
}
# The cards of latent-consistency/lcm-sdxl and SimianLuo/LCM_Dreamshaper_v7, h1t/TCD-SDXL-LoRA, stabilityai/sdxl-turbo,
# ByteDance/SDXL-Lightning and ByteDance/Hyper-SD. A guidance of 1 is none; one step of Turbo is less than most want.
_VARIANTS: Mapping[str, Defaults] = {
    LCM: Defaults(steps=4, guidance_scale=1.5, scheduler="lcm"),
    TCD: Defaults(steps=4, guidance_scale=1.0, scheduler="tcd"),
    TURBO: Defaults(steps=4, guidance_scale=1.0, scheduler="euler_a", noise_schedule=SGM_UNIFORM),
    LIGHTNING: Defaults(steps=4, guidance_scale=1.0, scheduler="euler", noise_schedule=SGM_UNIFORM),
    HYPER: Defaults(steps=8, guidance_scale=1.0, scheduler="ddim", noise_schedule=SGM_UNIFORM),
}
# diffusers' default for a UNet that takes the guidance as an input.
_EMBEDDED_GUIDANCE = 8.5
_BY_SCHEDULER: Mapping[str, str] = {"LCMScheduler": LCM, "TCDScheduler": TCD}
_BY_PIPELINE = "LatentConsistencyModel"
# A word of a name, where it begins and ends as one: by other marks than letters, or by a change of case.
_WORD = r"(?:(?<![A-Za-z])(?i:{word})(?![a-z])|(?<=[a-z])(?:{title}|{capitals})(?![a-z]))"
_MARKS: Mapping[str, re.Pattern[str]] = {
    name: re.compile(_WORD.format(word=name, title=name.title(), capitals=name.upper()))
    for name in (LCM, TURBO, LIGHTNING)
} | {
    # Alone it is part of many titles, such as "hyper realistic"; beside one of these it is ByteDance's.
    HYPER: re.compile(
        r"(?i)(?<![a-z])hyper[\s_-]*(?:sd|sdxl|xl|flash|\d+[\s_-]*steps?)(?![a-z])"
        r"|(?:sd|xl|1\.5|15)[\s_-]+hyper(?![a-z]|[\s_-]*real)"
    ),
}
# The families that there are such checkpoints of; a family of its own may have all.
_FAMILIES_OF: Mapping[str, tuple[str, ...]] = {
    LCM: ("", "sd1", "sd2", "sdxl"),
    TURBO: ("", "sd2", "sdxl"),
    LIGHTNING: ("", "sdxl"),
    HYPER: ("", "sd1", "sdxl"),
}
_STEPS = re.compile(r"(?i)(?<![0-9])([1-9][0-9]?)[\s_-]*steps?(?![a-z])")
# stabilityai's own, which was trained at 512 pixels in a family that has 1024.
_SMALL_TURBO = re.compile(r"(?i)^sd[_-]?xl[_-]turbo")
_SMALL_PX = 512
CHECKPOINTS_CACHED = 4096


def defaults_of(entry: CheckpointEntry) -> Defaults:
    """Of a checkpoint here, or of one that is only known by its name and configs."""
    return _defaults_of(entry, tuple(_stamps(entry.path)))


def _stamps(path: Path) -> Iterator[tuple[str, int]]:
    """Times of what is read beside the weights: a card that was changed is read again."""
    for file in (path, *card_files(path)):
        try:
            yield file.name, file.stat().st_mtime_ns
        except OSError:
            continue


@lru_cache(maxsize=CHECKPOINTS_CACHED)
def _defaults_of(entry: CheckpointEntry, stamps: object) -> Defaults:
    found = _FAMILIES.get(entry.base, NO_DEFAULTS)
    sources = [f"family {entry.base}"] if entry.base in _FAMILIES else []
    if str(entry.recipe.scheduler.get("_class_name", "")).startswith("EDM"):
        found = replace(found, scheduler="edm_euler", noise_schedule="")
        sources.append("scheduler config")
    card = card_of(entry.path)
    variant, said_by = _variant(entry, card.said)
    if variant:
        found = _with_variant(found, entry, variant)
        sources.append(f"{variant} by {said_by}")
    for name, values in card.values:
        better = _with_values(found, values, entry)
        sources += [name] if better != found else []
        found = better
    return replace(found, sources=tuple(sources))


def _variant(entry: CheckpointEntry, said: Mapping[str, str]) -> tuple[str, str]:
    """What distilled it to few steps, and what says so; both empty where nothing does."""
    by_config = _BY_SCHEDULER.get(str(entry.recipe.scheduler.get("_class_name", "")), "")
    if by_config:
        return by_config, "scheduler config"
    if entry.has_guidance_embedding or str(entry.recipe.index.get("_class_name", "")).startswith(_BY_PIPELINE):
        return LCM, "its configs"
    names = {"name": f"{entry.id} {entry.reference.rpartition('/')[2]}"}
    for source, text in {**said, **header_metadata(entry.path), **names}.items():
        for variant, mark in _MARKS.items():
            if mark.search(text) and entry.base in _FAMILIES_OF[variant]:
                return variant, source
    return "", ""


def _with_variant(found: Defaults, entry: CheckpointEntry, variant: str) -> Defaults:
    known = _VARIANTS[variant]
    steps = _STEPS.search(entry.id) if variant in (LIGHTNING, HYPER) else None
    is_small = variant == TURBO and entry.base == "sdxl" and _SMALL_TURBO.match(entry.id)
    return replace(
        found,
        variant=variant,
        steps=int(steps[1]) if steps else known.steps,
        guidance_scale=_EMBEDDED_GUIDANCE if entry.has_guidance_embedding else known.guidance_scale,
        scheduler=known.scheduler,
        noise_schedule=known.noise_schedule,
        width_px=_SMALL_PX if is_small else 0,
        height_px=_SMALL_PX if is_small else 0,
    )


# Spellings of options in cards, as `_plain` makes them: diffusers', A1111's and Civitai's.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "steps": ("steps", "numinferencesteps", "samplingsteps"),
    "guidance_scale": ("guidancescale", "cfgscale", "cfg"),
    "scheduler": ("sampler", "samplername", "scheduler"),
    "noise_schedule": ("scheduletype", "noiseschedule"),
    "width_px": ("width", "widthpx"),
    "height_px": ("height", "heightpx"),
}


def _with_values(found: Defaults, values: Mapping[str, Any], entry: CheckpointEntry) -> Defaults:
    """With the card's values that a request could have; others are passed over."""
    plain = {re.sub(r"[^a-z]", "", str(name).lower()): value for name, value in values.items()}
    said = {
        option: next((plain[spelling] for spelling in spellings if spelling in plain), None)
        for option, spellings in _SPELLINGS.items()
    }
    steps, guidance_scale = _number(said["steps"]), _number(said["guidance_scale"])
    if steps is not None and steps.is_integer() and 1 <= steps <= STEPS_LIMIT:
        found = replace(found, steps=int(steps))
    if guidance_scale is not None and 0 <= guidance_scale <= GUIDANCE_SCALE_LIMIT:
        found = replace(found, guidance_scale=guidance_scale)
    width, height = _number(said["width_px"]), _number(said["height_px"])
    step_px = max(entry.shape.latent_factor, DEFAULT_SIZE_STEP_PX)
    if width and height and all(
        side.is_integer() and SIDE_MIN_PX <= side <= SIDE_MAX_PX and side % step_px == 0 for side in (width, height)
    ):  # fmt: skip
        found = replace(found, width_px=int(width), height_px=int(height))
    if isinstance(said["scheduler"], str):
        schedule = said["noise_schedule"]
        found = with_scheduler(found, said["scheduler"], schedule if isinstance(schedule, str) else "")
    return found


def _number(value: object) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
