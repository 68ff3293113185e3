"""Encoded prompts, kept: a job's pictures, and everybody's usual negative prompt, are encoded once."""

from services.diffusion.engine.byte_cache import ByteCache
from services.diffusion.generation import Generation
from services.diffusion.models.loading import Checkpoint
from services.diffusion.models.marks import mark
from services.diffusion.prompt.encode import Conditioning, encode_one, encode_pair

PROMPTS_LIMIT_BYTES = 64 * 2**20

Pair = tuple[Conditioning, Conditioning | None]


class Prompts:
    """For the device thread."""

    def __init__(self) -> None:
        self._cache: ByteCache[Pair] = ByteCache(limit_bytes=PROMPTS_LIMIT_BYTES, size_of=_size_bytes)

    def clear(self) -> None:
        self._cache.clear()

    def get(self, generation: Generation, checkpoint: Checkpoint) -> Pair:
        """`checkpoint`: assembled for the generation. Without guidance the negative prompt is not looked at."""
        key = (
            generation.checkpoint,
            tuple((use.entry, use.text_weight) for use in generation.loras),
            generation.embeddings,
            generation.text_layer,
            generation.prompt,
            generation.negative_prompt if generation.is_guided else None,
            _marks(generation),
        )
        return self._cache.get(key, lambda: _encode(generation, checkpoint))


def _marks(generation: Generation) -> tuple[object, ...]:
    """Another one when a file that prompts are encoded with was replaced."""
    checkpoint = generation.checkpoint
    return (
        *(mark(checkpoint.path, text.part) for text in checkpoint.recipe.texts),
        *(mark(use.entry.path, "") for use in generation.loras),
        *(mark(embedding.path, "") for embedding in generation.embeddings),
    )


def _encode(generation: Generation, checkpoint: Checkpoint) -> Pair:
    layer = generation.text_layer
    if generation.is_guided:
        return encode_pair(checkpoint, generation.prompt, generation.negative_prompt, layer=layer)
    return encode_one(checkpoint, generation.prompt, layer=layer), None


def _size_bytes(pair: Pair) -> int:
    return sum(each.nbytes for each in pair if each is not None)
