"""Prompts to conditioning with the checkpoint's one or two CLIP text encoders, and a cache of it.

A long prompt is encoded in chunks. For the device thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanlight.contract.prompt import parse_prompt
from services.diffusion.engine.generation import Generation
from services.diffusion.models.clip import TextStates
from services.diffusion.models.entries import fingerprint
from services.diffusion.models.model_cache import Checkpoint
from services.diffusion.prompt import PromptChunk, TextPart, to_chunks
from services.kernel.blobs import ByteLru

CACHE_LIMIT_BYTES = 64 * 2**20

# What diffusers' pipelines fill in for the refiner.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5

# The least mean that is not rounding, as a part of the numbers' mean size; CLIP's states have a hundredth and more.
_MEAN_FLOOR = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """`embeds`: (1, L, C); `pooled`: (1, P), the whole prompt in one vector, for checkpoints that take it (SDXL)."""

    embeds: Tensor
    pooled: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


# The conditioning, and with guidance the unconditional one.
Pair = tuple[Conditioning, Conditioning | None]


class ConditioningCache:
    """Byte-bounded LRU cache: the images of a job, and a common negative prompt, are encoded once. For one thread."""

    def __init__(self) -> None:
        self._cache: ByteLru[tuple[object, ...], Pair] = ByteLru(limit_bytes=CACHE_LIMIT_BYTES, size_of=_size_bytes)

    def clear(self) -> None:
        self._cache.clear()

    def get(self, generation: Generation, checkpoint: Checkpoint) -> Pair:
        """`checkpoint`: assembled for the generation. Without guidance the negative prompt is not encoded."""
        key = (
            generation.checkpoint,
            str(checkpoint.dtype),
            tuple((use.entry, use.text_weight) for use in generation.loras),
            generation.embeddings,
            generation.text_layer,
            generation.prompt,
            generation.negative_prompt if generation.is_guided else None,
            _fingerprints(generation),
        )
        pair = self._cache.get(key)
        if pair is None:
            pair = _encode_prompts(generation, checkpoint)
            self._cache.put(key, pair)
        return pair


def _fingerprints(generation: Generation) -> tuple[object, ...]:
    """Changes when a file that prompts are encoded with is replaced."""
    checkpoint = generation.checkpoint
    return (
        *(fingerprint(checkpoint.path, text.part) for text in checkpoint.recipe.texts),
        *(fingerprint(use.entry.path, "") for use in generation.loras),
        *(fingerprint(embedding.path, "") for embedding in generation.embeddings),
    )


def _encode_prompts(generation: Generation, checkpoint: Checkpoint) -> Pair:
    layer = generation.text_layer
    if generation.is_guided:
        return encode_pair(checkpoint, generation.prompt, generation.negative_prompt, layer=layer)
    return encode_one(checkpoint, generation.prompt, layer=layer), None


def _size_bytes(pair: Pair) -> int:
    return sum(each.nbytes for each in pair if each is not None)


def encode_pair(
    checkpoint: Checkpoint, prompt: str, negative: str, *, layer: int = 1
) -> tuple[Conditioning, Conditioning]:
    """Conditioning and unconditional, of one length: the shorter is filled up with empty chunks.

    Checkpoints that were trained with zeros for an empty prompt (SDXL base) get zeros for an empty negative one.
    `layer`: counted from the encoder's end; 1 is the one that the checkpoint was trained with. As in diffusers'
    pipelines it applies to the prompt alone.
    """
    positive_chunks = _chunks(checkpoint, prompt, "prompt")
    negative_chunks = _chunks(checkpoint, negative, "negative_prompt")
    count = max(len(chunks) for chunks in (*positive_chunks, *negative_chunks))
    conditioning = _encode(checkpoint, positive_chunks, count, layer)
    unconditional = _encode(checkpoint, negative_chunks, count, 1)
    if checkpoint.entry.zeroes_empty_negative and not negative:
        pooled = unconditional.pooled
        unconditional = Conditioning(
            torch.zeros_like(unconditional.embeds), None if pooled is None else torch.zeros_like(pooled)
        )
    return conditioning, unconditional


def encode_one(checkpoint: Checkpoint, prompt: str, *, layer: int = 1) -> Conditioning:
    """`layer`: as in encode_pair."""
    chunks = _chunks(checkpoint, prompt, "prompt")
    return _encode(checkpoint, chunks, max(len(own) for own in chunks), layer)


def time_ids(checkpoint: Checkpoint, generation: Generation, *, is_unconditional: bool) -> Tensor:
    """(1, 6), or (1, 5) for a refiner: the image's size in pixels, an uncropped corner, then that size or a score.

    As in Podell et al. 2023 and diffusers' pipelines.
    """
    size = [generation.height_px, generation.width_px]
    if checkpoint.entry.takes_aesthetic_score:
        ids = [*size, 0, 0, NEGATIVE_AESTHETIC_SCORE if is_unconditional else AESTHETIC_SCORE]
    else:
        ids = [*size, 0, 0, *size]
    return torch.tensor([ids], dtype=checkpoint.dtype, device=checkpoint.device)


def _chunks(checkpoint: Checkpoint, prompt: str, field: str) -> list[list[PromptChunk]]:
    """One list for each text encoder."""
    read = parse_prompt(prompt, field)
    return [to_chunks(text, read, field) for text in checkpoint.texts]


def _encode(checkpoint: Checkpoint, chunks: Sequence[list[PromptChunk]], count: int, layer: int) -> Conditioning:
    """The encoders' states side by side, (1, count * L, C); the pooled vector is the last encoder's."""
    states: list[Tensor] = []
    pooled: Tensor | None = None
    for text, own in zip(checkpoint.texts, chunks, strict=True):
        filled = own + [PromptChunk([], [])] * (count - len(own))
        rows = [_with_marks(text, chunk.ids) for chunk in filled]
        if max(map(max, rows)) >= text.rows:
            # On a GPU it would be a bad access, which ends the process.
            raise ValueError("the tokenizer has tokens that the text encoder has no vectors for")
        ids = torch.tensor(rows, device=checkpoint.device)
        encoded: TextStates = text.encoder(ids)
        state = _weighted(_state(text, encoded, layer), filled)
        states.append(state.reshape(1, -1, state.shape[-1]))
        # Of a prompt in several chunks the first one's vector counts, as in A1111.
        if text.is_pooled:
            assert encoded.text_embeds is not None
            pooled = encoded.text_embeds[:1].to(checkpoint.dtype)
    return Conditioning(torch.cat(states, dim=-1).to(checkpoint.dtype), pooled)


def _state(text: TextPart, encoded: TextStates, layer: int) -> Tensor:
    """(chunks, L, C) of the chosen layer; of layers before the last, SD takes the normalized states."""
    place = layer + 1 if text.is_penultimate else layer
    assert place < len(encoded.hidden_states), "a request's layer is checked against the checkpoint's recipe"
    if place == 1:
        return encoded.last_hidden_state
    state = encoded.hidden_states[-place]
    if text.is_penultimate:
        return state
    normalized: Tensor = text.encoder.final_layer_norm(state)
    return normalized


def _weighted(states: Tensor, chunks: Sequence[PromptChunk]) -> Tensor:
    """States (chunks, L, C), each token's times its weight, then each chunk's mean restored, as A1111 does."""
    weighted = []
    for state, chunk in zip(states, chunks, strict=True):
        if not chunk.is_weighted:
            weighted.append(state)
            continue
        column = state.new_ones(len(state), 1)
        column[1 : 1 + len(chunk.ids), 0] = state.new_tensor(chunk.weights)
        scaled = state * column
        weighted.append(scaled * _mean_ratio(state, scaled))
    return torch.stack(weighted)


def _mean_ratio(state: Tensor, scaled: Tensor) -> float:
    """The factor that restores the mean of (L, C); 1 where the mean is only the rounding of numbers that sum to 0."""
    original, mean = float(state.float().mean()), float(scaled.float().mean())
    is_significant = abs(mean) > float(scaled.float().abs().mean()) * _MEAN_FLOOR
    return original / mean if is_significant else 1.0


def _with_marks(text: TextPart, ids: list[int]) -> list[int]:
    """Start mark, the chunk, end mark, padding: as the tokenizer itself encodes a short prompt."""
    tokenizer = text.tokenizer
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (text.positions - len(row))
