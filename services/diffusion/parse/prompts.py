"""A request's prompts, and the LoRAs and embeddings that they and its fields name."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from fanlight.contract.limits import DEFAULT_LORA_WEIGHT, EMBEDDINGS_LIMIT
from fanlight.contract.prompt import LoraTag, ParsedPrompt, parse_prompt, without_loras
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from services.diffusion.models.catalog import ModelCatalog, has_widths
from services.diffusion.models.entries import CheckpointEntry, EmbeddingEntry, LoraEntry, LoraUse
from services.diffusion.prompt import embedding_pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPrompts:
    """The prompt, and the models that both prompts and the request's fields name."""

    # Without LoRA tags.
    prompt: str
    loras: tuple[LoraUse, ...]
    embeddings: tuple[EmbeddingEntry, ...]
    # What this worker does otherwise than they may have meant, in sentences.
    warnings: tuple[str, ...] = ()


def read_prompts(
    request: diffusion_pb2.GenerateRequest, catalog: ModelCatalog, checkpoint: CheckpointEntry
) -> ReadPrompts:
    prompt = parse_prompt(request.prompt, "prompt")
    negative = parse_prompt(request.negative_prompt, "negative_prompt")
    loras = _loras(request, prompt.loras, catalog, checkpoint)
    bundled = {each.id.lower(): each for use in reversed(loras) for each in use.entry.bundled}
    fitting = {word: each for word, each in bundled.items() if has_widths(each, checkpoint)}
    return ReadPrompts(
        prompt=without_loras(request.prompt, prompt.loras),
        loras=loras,
        embeddings=_embeddings(request, [prompt, negative], catalog, checkpoint, fitting),
        warnings=tuple(
            f"LoRA {each.bundled_in} brings a textual inversion {each.id} along, which is for another base than"
            f" {checkpoint.id}: it was not used"
            for word, each in bundled.items()
            if word not in fitting and _mentioned([prompt, negative], [word])
        ),
    )


def _loras(
    request: diffusion_pb2.GenerateRequest,
    tags: tuple[LoraTag, ...],
    catalog: ModelCatalog,
    checkpoint: CheckpointEntry,
) -> tuple[LoraUse, ...]:
    """The weights of a LoRA that is named twice add up; LoRAs of weight 0 are left out."""
    weights: dict[LoraEntry, tuple[float, float]] = {}
    for use in [*_listed(request, catalog, checkpoint), *_tagged(tags, catalog, checkpoint)]:
        unet, encoder = weights.get(use.entry, (0.0, 0.0))
        weights[use.entry] = (unet + use.unet_weight, encoder + use.text_weight)
    return tuple(
        LoraUse(entry=entry, unet_weight=unet, text_weight=encoder)
        for entry, (unet, encoder) in weights.items()
        if unet or encoder
    )


def _listed(
    request: diffusion_pb2.GenerateRequest, catalog: ModelCatalog, checkpoint: CheckpointEntry
) -> Iterable[LoraUse]:
    for place, lora in enumerate(request.loras):
        try:
            unet = lora.weight if lora.HasField("weight") else DEFAULT_LORA_WEIGHT
            encoder = lora.text_encoder_weight if lora.HasField("text_encoder_weight") else unet
            yield LoraUse(entry=catalog.lora(lora.model, checkpoint), unet_weight=unet, text_weight=encoder)
        except FanlightError as error:
            raise error.within(f"loras[{place}]") from error


def _tagged(tags: tuple[LoraTag, ...], catalog: ModelCatalog, checkpoint: CheckpointEntry) -> Iterable[LoraUse]:
    for tag in tags:
        try:
            entry = catalog.lora(tag.name, checkpoint)
        except FanlightError as error:
            raise type(error)(f"character {tag.at + 1}: {error.message}", field="prompt") from error
        yield LoraUse(entry=entry, unet_weight=tag.unet_weight, text_weight=tag.text_weight)


def _embeddings(
    request: diffusion_pb2.GenerateRequest,
    prompts: list[ParsedPrompt],
    catalog: ModelCatalog,
    checkpoint: CheckpointEntry,
    bundled: Mapping[str, EmbeddingEntry],
) -> tuple[EmbeddingEntry, ...]:
    """Those that a prompt names, listed or not; a listed one must exist.

    `bundled`: those that the request's LoRAs bring along, by name; they come before others of that name.
    """
    listed = [
        catalog.embedding(name, checkpoint, field=f"embeddings[{place}]")
        for place, name in enumerate(request.embeddings)
    ]
    known = {entry.id.lower(): entry for entry in [*catalog.embeddings_of(checkpoint), *listed]} | bundled
    found = _mentioned(prompts, known)
    if len(found) > EMBEDDINGS_LIMIT:
        raise InvalidField(f"names {len(found)} embeddings; at most {EMBEDDINGS_LIMIT}", field="prompt")
    return tuple(known[name] for name in sorted(found))


def _mentioned(prompts: list[ParsedPrompt], names: Collection[str]) -> set[str]:
    """Which of the names, in lower case, a prompt mentions."""
    if not names:
        return set()
    pattern = embedding_pattern(list(names))
    words = [segment.text for prompt in prompts for part in prompt.parts for segment in part]
    return {match.group().lower() for each in words for match in pattern.finditer(each)}
