"""A request's prompts, and the LoRAs and embeddings that they and its fields name."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from fanlight.contract.generation import parsed_prompts, steps_of, syntax_of
from fanlight.contract.limits import DEFAULT_LORA_WEIGHT, EMBEDDINGS_LIMIT
from fanlight.contract.prompt import ORIGINAL, LoraTag, read_weights
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, InvalidField
from services.diffusion.engine.generation import SDXL_LAYER
from services.diffusion.models.catalog import ModelCatalog, has_widths
from services.diffusion.models.entries import CheckpointEntry, EmbeddingEntry, LoraEntry, LoraUse, part_id
from services.diffusion.prompt import embedding_pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPrompts:
    """The prompt, and the models that both prompts and the request's fields name."""

    # Without LoRA tags.
    prompt: str
    negative_prompt: str
    loras: tuple[LoraUse, ...]
    embeddings: tuple[EmbeddingEntry, ...]
    # What this worker does otherwise than they may have meant, in sentences.
    warnings: tuple[str, ...] = ()


def read_prompts(
    request: diffusion_pb2.GenerateRequest, catalog: ModelCatalog, checkpoint: CheckpointEntry
) -> ReadPrompts:
    prompts = parsed_prompts(request)
    prompt = prompts["prompt"]
    loras, words = _loras(request, prompt.loras, catalog, checkpoint), list(_segment_texts(request))
    bundled = {each.id.lower(): each for use in reversed(loras) for each in use.entry.bundled}
    fitting = {word: each for word, each in bundled.items() if has_widths(each, checkpoint)}
    return ReadPrompts(
        prompt=prompt.text if prompt.text == request.prompt else prompt.text.strip(),
        # Where there are any, they were left out of a forgiving reading.
        negative_prompt=prompts["negative_prompt"].text,
        loras=loras,
        embeddings=_embeddings(request, words, catalog, checkpoint, fitting),
        warnings=(
            *_clip_skip_warnings(request, checkpoint),
            *(
                f"LoRA {each.bundled_in} brings the textual inversion {each.id} along, which is for another base than"
                f" {checkpoint.id}: it was not used"
                for word, each in bundled.items()
                if word not in fitting and _mentioned(words, [word])
            ),
            *_shared_names_warnings(words, catalog, checkpoint, fitting),
        ),
    )


def _segment_texts(request: diffusion_pb2.GenerateRequest) -> set[str]:
    """All texts of one weight that the prompts have in any step."""
    syntax, emphasis = syntax_of(request), request.emphasis or ORIGINAL
    texts = [text for prompt in parsed_prompts(request).values() for text in prompt.texts(steps_of(request))]
    parts = [part for text in texts for part in read_weights(text, syntax, emphasis)]
    return {segment.text for part in parts for segment in part}


def _clip_skip_warnings(request: diffusion_pb2.GenerateRequest, checkpoint: CheckpointEntry) -> tuple[str, ...]:
    """About a `clip_skip` of another kind of checkpoint. Of SDXL 2 is posted everywhere, and means no change."""
    if checkpoint.recipe.is_sdxl:
        if not request.HasField("sdxl_clip_skip") and request.clip_skip > SDXL_LAYER:
            return (f"clip_skip: changes nothing for {checkpoint.id}, which is SDXL; sdxl_clip_skip does",)
        return ()
    if request.HasField("sdxl_clip_skip"):
        return (f"sdxl_clip_skip: changes nothing for {checkpoint.id}, which is not SDXL; clip_skip does",)
    return ()


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
    words: Iterable[str],
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
    known = {entry.id.lower(): entry for entry in [*catalog.embeddings_of(checkpoint), *listed]} | dict(bundled)
    found = _mentioned(words, known)
    if len(found) > EMBEDDINGS_LIMIT:
        raise InvalidField(f"names {len(found)} embeddings; at most {EMBEDDINGS_LIMIT}", field="prompt")
    return tuple(known[name] for name in sorted(found))


def _shared_names_warnings(
    words: Iterable[str], catalog: ModelCatalog, checkpoint: CheckpointEntry, bundled: Collection[str]
) -> Iterable[str]:
    """About names that several embeddings' files have, so that they mean none of them."""
    sharing: dict[str, list[str]] = defaultdict(list)
    known = {*bundled}
    for entry in catalog.embeddings_of(checkpoint):
        known.add(entry.id.lower())
        if not entry.reference and entry.id != (name := part_id(entry.path)):
            sharing[name.lower()].append(entry.id)
    for name in sorted(_mentioned(words, known | sharing.keys()) & (sharing.keys() - known)):
        several = " or ".join(sharing[name][:_SHARING_LIMIT])
        yield f"{name} is the name of several embeddings, and was read as plain words: write {several}"


# How many a warning lists.
_SHARING_LIMIT = 4


def _mentioned(words: Iterable[str], names: Collection[str]) -> set[str]:
    """Which of the names, in lower case, the texts mention."""
    if not names:
        return set()
    pattern = embedding_pattern(list(names))
    return {match.group().lower() for each in words for match in pattern.finditer(each)}
