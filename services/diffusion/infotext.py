"""A picture's parameters as A1111 writes them, so that its tools, Civitai and others read them. Pure."""

import json
from collections.abc import Callable, Iterable, Mapping

from fanlight.contract.schedulers import SCHEDULE_TITLES, SCHEDULERS
from services.diffusion.digests import FileDigest
from services.diffusion.generation import A1111_OPTIONS, Generation, default_of
from services.diffusion.models.entries import Entry

Digests = Callable[[Entry], tuple[FileDigest, ...]]

# A1111 calls a file by so much of its sha256.
_SHORT = 10


def infotext(generation: Generation, digests: Digests, *, version: str) -> str:
    lines = [_prompt(generation)]
    if generation.negative_prompt:
        lines.append(f"Negative prompt: {generation.negative_prompt}")
    fields = [f"{name}: {_quoted(value)}" for name, value in _fields(generation, digests, version)]
    return "\n".join([*lines, ", ".join(fields)])


def _prompt(generation: Generation) -> str:
    tags = []
    for use in generation.loras:
        weights = [use.unet_weight] if use.unet_weight == use.text_weight else [use.unet_weight, use.text_weight]
        tags.append(f"<lora:{use.entry.id}:{':'.join(f'{weight:g}' for weight in weights)}>")
    return " ".join(part for part in (generation.prompt, *tags) if part)


def _fields(generation: Generation, digests: Digests, version: str) -> Iterable[tuple[str, str]]:
    yield "Steps", str(generation.steps)
    yield "Sampler", SCHEDULERS[generation.scheduler].a1111 or generation.scheduler
    if generation.noise_schedule:
        yield "Schedule type", SCHEDULE_TITLES[generation.noise_schedule]
    yield "CFG scale", f"{generation.guidance_scale:g}"
    yield "Seed", str(generation.seed)
    yield "Size", f"{generation.width_px}x{generation.height_px}"
    yield "Model hash", _short_hash(digests(generation.checkpoint))
    yield "Model", generation.checkpoint.id
    if generation.vae:
        yield "VAE hash", _short_hash(digests(generation.vae))
        yield "VAE", generation.vae.id
    for option, title in A1111_OPTIONS.items():
        value = getattr(generation, option)
        if value != default_of(option):
            yield title, f"{value:g}" if isinstance(value, float) else str(value)
    for number, control in enumerate(generation.controls):
        yield f"ControlNet {number}", _control(generation, number, control.controlnet.id)
    if generation.loras:
        yield "Lora hashes", _hashes({use.entry.id: digests(use.entry) for use in generation.loras})
    if generation.embeddings:
        yield "TI hashes", _hashes({entry.id: digests(entry) for entry in generation.embeddings})
    yield "Version", f"Fanlight {version}"


def _control(generation: Generation, number: int, net: str) -> str:
    control = generation.controls[number]
    mode = "ControlNet is more important" if generation.guess_mode else "Balanced"
    return (
        f"Module: {control.annotator or 'none'}, Model: {net}, Weight: {control.scale:g},"
        f" Guidance Start: {control.start:g}, Guidance End: {control.end:g}, Control Mode: {mode}"
    )


def _hashes(files: Mapping[str, tuple[FileDigest, ...]]) -> str:
    return ", ".join(f"{name}: {_short_hash(digests)}" for name, digests in files.items())


def _short_hash(digests: tuple[FileDigest, ...]) -> str:
    """Of a model in several files the UNet's counts; it is what makes the model."""
    unet = next((digest for digest in digests if digest.path.startswith("unet/")), None)
    main = unet or (digests[0] if digests else None)
    return main.sha256[:_SHORT] if main else ""


def _quoted(value: str) -> str:
    """As A1111 does with what would read as several fields."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",\n:") else value
