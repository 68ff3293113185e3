"""The options of a generation, which the job's message and the worker's request have under the same names."""

from collections.abc import Sequence
from typing import Literal

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.jobs.painting import LoraUse, PaintOptions, loras_in, with_loras_renamed, words_in
from services.gateway.jobs.workers import EMBEDDING, LORA, VAE, Catalog, Model
from services.gateway.wire import fields
from services.gateway.wire.catalog import model_of, models_for
from services.kernel.errors import InvalidField

LORAS_LIMIT = 16
EMBEDDINGS_LIMIT = 32
LORA_WEIGHT_LIMIT = 4.0
CLIP_SKIP_LIMIT = 12
QUALITY_LIMIT = 100

RESIZES = ("crop", "stretch", "pad")
NOISE_SCHEDULES = ("karras", "exponential", "sgm_uniform")
FORMATS = ("png", "webp", "jpeg")
SAFETY_MODES = ("off", "flag", "blur", "block")

Message = gateway_pb2.Generation | diffusion_pb2.GenerateRequest


def options(message: gateway_pb2.Generation, catalog: Catalog, model: Model) -> PaintOptions:
    """InvalidField and NotFound name the field."""
    return PaintOptions(
        strength=_strength(message),
        resize=_one_of(message.resize, RESIZES, "resize"),
        guess_mode=message.guess_mode,
        loras=_loras(message.loras, catalog, model),
        vae=model_of(catalog, VAE, message.vae, model, field="generation.vae") if message.vae else "",
        embeddings=_embeddings(message.embeddings, catalog, model),
        clip_skip=_whole(message, "clip_skip", CLIP_SKIP_LIMIT),
        noise_schedule=_one_of(message.noise_schedule, NOISE_SCHEDULES, "noise_schedule"),
        eta=fields.number(message.eta, 0.0, 1.0, field="generation.eta") if message.HasField("eta") else None,
        format=_one_of(message.format, FORMATS, "format"),
        quality=_whole(message, "quality", QUALITY_LIMIT),
        safety_checker=_one_of(message.safety_checker, SAFETY_MODES, "safety_checker"),
        strict=message.strict,
    )


def prompt_of(message: gateway_pb2.Generation, catalog: Catalog, model: Model) -> str:
    """With LoRAs called by their ids. NotFound where no worker offers one that it names; InvalidField for too many."""
    field, named = "generation.prompt", len(loras_in(message.prompt))
    if named and named + len(message.loras) > LORAS_LIMIT:
        count = named + len(message.loras)
        raise InvalidField(f"names {named} LoRAs, {count} with those listed; at most {LORAS_LIMIT}", field=field)
    return with_loras_renamed(message.prompt, lambda name: model_of(catalog, LORA, name, model, field=field))


def words(message: gateway_pb2.Generation, listed: Sequence[str], catalog: Catalog, model: Model) -> tuple[str, ...]:
    """Embeddings that the prompts name and nobody listed: a worker without them takes their names for words."""
    offered = sorted(models_for(catalog, EMBEDDING, model))
    named = words_in(f"{message.prompt}\n{message.negative_prompt}", offered)
    more = tuple(each for each in named if each not in listed)
    if len(listed) + len(more) > EMBEDDINGS_LIMIT:
        count = len(listed) + len(more)
        raise InvalidField(
            f"names {len(more)} embeddings, {count} with those listed; at most {EMBEDDINGS_LIMIT}",
            field="generation.prompt",
        )
    return more


def fill(message: Message, value: PaintOptions) -> None:
    """Set the options in a message; what was left open stays so."""
    for name in ("strength", "clip_skip", "eta", "quality"):
        if (number := getattr(value, name)) is not None:
            setattr(message, name, number)
    for name in ("resize", "vae", "noise_schedule", "format", "safety_checker"):
        setattr(message, name, getattr(value, name))
    message.guess_mode, message.strict = value.guess_mode, value.strict
    message.embeddings.extend(value.embeddings)
    message.loras.extend(
        diffusion_pb2.LoraUse(model=use.model, weight=use.weight, text_encoder_weight=use.text_encoder_weight)
        for use in value.loras
    )


def _strength(message: gateway_pb2.Generation) -> float | None:
    if not message.HasField("strength"):
        return None
    if not message.HasField("image"):
        raise InvalidField("is for an image to start from, and there is none", field="generation.strength")
    if not 0 < message.strength <= 1:
        raise InvalidField(f"is {message.strength:g}; must be above 0, to 1", field="generation.strength")
    return message.strength


def _loras(uses: Sequence[diffusion_pb2.LoraUse], catalog: Catalog, model: Model) -> tuple[LoraUse, ...]:
    if len(uses) > LORAS_LIMIT:
        raise InvalidField(f"has {len(uses)} entries; at most {LORAS_LIMIT}", field="generation.loras")
    return tuple(_lora(use, catalog, model, f"generation.loras[{i}]") for i, use in enumerate(uses))


def _lora(use: diffusion_pb2.LoraUse, catalog: Catalog, model: Model, field: str) -> LoraUse:
    return LoraUse(
        model=model_of(catalog, LORA, use.model, model, field=f"{field}.model"),
        weight=_weight(use.weight, f"{field}.weight") if use.HasField("weight") else None,
        text_encoder_weight=_weight(use.text_encoder_weight, f"{field}.text_encoder_weight")
        if use.HasField("text_encoder_weight")
        else None,
    )


def _weight(value: float, field: str) -> float:
    return fields.number(value, -LORA_WEIGHT_LIMIT, LORA_WEIGHT_LIMIT, field=field)


def _embeddings(names: Sequence[str], catalog: Catalog, model: Model) -> tuple[str, ...]:
    if len(names) > EMBEDDINGS_LIMIT:
        raise InvalidField(f"has {len(names)} entries; at most {EMBEDDINGS_LIMIT}", field="generation.embeddings")
    return tuple(
        model_of(catalog, EMBEDDING, name, model, field=f"generation.embeddings[{i}]") for i, name in enumerate(names)
    )


def _whole(message: gateway_pb2.Generation, name: Literal["clip_skip", "quality"], limit: int) -> int | None:
    if not message.HasField(name):
        return None
    return fields.whole(getattr(message, name), 1, limit, field=f"generation.{name}")


def _one_of(text: str, known: Sequence[str], name: str) -> str:
    if text and text not in known:
        raise InvalidField(f"is {text[:80]!r}; must be {', '.join(known)}, or empty", field=f"generation.{name}")
    return text
