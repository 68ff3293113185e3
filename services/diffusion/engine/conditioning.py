"""Prompts to conditioning with the checkpoint's one or two CLIP text encoders, and a cache of it.

A long prompt is encoded in chunks. For the device thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanlight.contract.prompt import NO_NORM, ORIGINAL, STRICT, parse_prompt, read_weights
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


# Each conditioning with the last step, counted from 1, that has it; in order.
Schedule = tuple[tuple[int, Conditioning], ...]


@dataclass(frozen=True, slots=True, eq=False)
class RowConditioning:
    """All that one image is conditioned on, step by step; all of one length L."""

    # With its weight, for each of the prompts that are composed by AND.
    prompts: tuple[tuple[Schedule, float], ...]
    # None without guidance.
    unconditional: Schedule | None = None

    def at(self, step: int) -> "StepConditioning":
        """`step`: from 1."""
        prompts = tuple((_turn(schedule, step), weight) for schedule, weight in self.prompts)
        return StepConditioning(prompts, _turn(self.unconditional, step) if self.unconditional else None)

    @property
    def length(self) -> int:
        """L."""
        return self.prompts[0][0][0][1].embeds.shape[1]

    @property
    def nbytes(self) -> int:
        schedules = [schedule for schedule, _ in self.prompts] + ([self.unconditional] if self.unconditional else [])
        return sum({id(each): each.nbytes for schedule in schedules for _, each in schedule}.values())


@dataclass(frozen=True, slots=True, eq=False)
class StepConditioning:
    """What one step is conditioned on: prompts with their weights, and with guidance the unconditional one."""

    prompts: tuple[tuple[Conditioning, float], ...]
    unconditional: Conditioning | None


def _turn(schedule: Schedule, step: int) -> Conditioning:
    return next((each for end, each in schedule if step <= end), schedule[-1][1])


class ConditioningCache:
    """Byte-bounded LRU cache: the images of a job, and a common negative prompt, are encoded once. For one thread."""

    def __init__(self) -> None:
        self._cache: ByteLru[tuple[object, ...], RowConditioning] = ByteLru(
            limit_bytes=CACHE_LIMIT_BYTES, size_of=lambda each: each.nbytes
        )

    def clear(self) -> None:
        self._cache.clear()

    def get(self, generation: Generation, checkpoint: Checkpoint) -> RowConditioning:
        """`checkpoint`: assembled for the generation. Without guidance the negative prompt is not encoded."""
        schedules = PromptSchedules.of(generation)
        key = (
            generation.checkpoint,
            str(checkpoint.dtype),
            tuple((use.entry, use.text_weight) for use in generation.loras),
            generation.embeddings,
            generation.text_layer,
            schedules,
            _fingerprints(generation),
        )
        conditioning = self._cache.get(key)
        if conditioning is None:
            conditioning = _Encoder(checkpoint, generation.text_layer, schedules.syntax, schedules.emphasis).row(
                schedules
            )
            self._cache.put(key, conditioning)
        return conditioning


def _fingerprints(generation: Generation) -> tuple[object, ...]:
    """Changes when a file that prompts are encoded with is replaced."""
    checkpoint = generation.checkpoint
    return (
        *(fingerprint(checkpoint.path, text.part) for text in checkpoint.recipe.texts),
        *(fingerprint(use.entry.path, "") for use in generation.loras),
        *(fingerprint(embedding.path, "") for embedding in generation.embeddings),
    )


# Texts, each with the last step that has it.
_Texts = tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class PromptSchedules:
    """What a generation's prompts say in each step, and how that is read. A text that never changes ends at 0."""

    prompts: tuple[tuple[_Texts, float], ...]
    # None without guidance.
    negative: _Texts | None
    syntax: str = STRICT
    emphasis: str = ORIGINAL

    @classmethod
    def of(cls, generation: Generation) -> "PromptSchedules":
        syntax, steps = generation.prompt_syntax, generation.steps
        prompt = parse_prompt(generation.prompt, "prompt", syntax)
        negative = parse_prompt(generation.negative_prompt, "negative_prompt", syntax).prompts[0]
        return cls(
            tuple((_without_steps(each.schedule(steps)), each.weight) for each in prompt.prompts),
            _without_steps(negative.schedule(steps)) if generation.is_guided else None,
            syntax,
            generation.emphasis,
        )


def _without_steps(texts: _Texts) -> _Texts:
    """Equal for all numbers of steps, where the text is the same in all."""
    return ((0, texts[0][1]),) if len(texts) == 1 else texts


def encode_pair(
    checkpoint: Checkpoint, prompt: str, negative: str, *, layer: int = 1
) -> tuple[Conditioning, Conditioning]:
    """Conditioning and unconditional of prompts that never change, of one length. `layer`: Generation.text_layer."""
    step = _Encoder(checkpoint, layer).row(PromptSchedules(((((0, prompt),), 1.0),), ((0, negative),))).at(1)
    assert step.unconditional is not None
    return step.prompts[0][0], step.unconditional


def encode_one(checkpoint: Checkpoint, prompt: str, *, layer: int = 1) -> Conditioning:
    """`layer`: as in encode_pair."""
    return _Encoder(checkpoint, layer).row(PromptSchedules(((((0, prompt),), 1.0),), None)).at(1).prompts[0][0]


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


class _Encoder:
    """Encodes the texts of one image, each once, all filled up with empty chunks to the longest one's length."""

    def __init__(self, checkpoint: Checkpoint, layer: int, syntax: str = STRICT, emphasis: str = ORIGINAL) -> None:
        self._checkpoint = checkpoint
        self._layer = layer
        self._syntax = syntax
        self._emphasis = emphasis

    def row(self, schedules: PromptSchedules) -> RowConditioning:
        """InvalidField for a prompt of too many tokens."""
        prompts = {text: self._chunks(text, "prompt") for texts, _ in schedules.prompts for _, text in texts}
        negatives = {text: self._chunks(text, "negative_prompt") for _, text in schedules.negative or ()}
        count = max(len(chunks) for texts in (prompts, negatives) for own in texts.values() for chunks in own)
        encoded = {text: self._encode(chunks, count) for text, chunks in (prompts | negatives).items()}
        unconditional = None
        if schedules.negative is not None:
            unconditional = tuple((end, self._zeroed(text, encoded[text])) for end, text in schedules.negative)
        return RowConditioning(
            tuple((tuple((end, encoded[text]) for end, text in texts), weight) for texts, weight in schedules.prompts),
            unconditional,
        )

    def _zeroed(self, negative: str, unconditional: Conditioning) -> Conditioning:
        """Checkpoints trained with zeros for an empty prompt (SDXL base) get zeros for an empty negative one."""
        if negative or not self._checkpoint.entry.zeroes_empty_negative:
            return unconditional
        pooled = unconditional.pooled
        return Conditioning(
            torch.zeros_like(unconditional.embeds), None if pooled is None else torch.zeros_like(pooled)
        )

    def _chunks(self, text: str, field: str) -> list[list[PromptChunk]]:
        """One list for each text encoder."""
        parts = read_weights(text, self._syntax, self._emphasis)
        return [to_chunks(part, parts, field) for part in self._checkpoint.texts]

    def _encode(self, chunks: Sequence[list[PromptChunk]], count: int) -> Conditioning:
        """The encoders' states side by side, (1, count * L, C); the pooled vector is the last encoder's."""
        states: list[Tensor] = []
        pooled: Tensor | None = None
        for text, own in zip(self._checkpoint.texts, chunks, strict=True):
            filled = own + [PromptChunk([], [])] * (count - len(own))
            rows = [_with_marks(text, chunk.ids) for chunk in filled]
            if max(map(max, rows)) >= text.rows:
                # On a GPU it would be a bad access, which ends the process.
                raise ValueError("the tokenizer has tokens that the text encoder has no vectors for")
            ids = torch.tensor(rows, device=self._checkpoint.device)
            encoded: TextStates = text.encoder(ids)
            state = _weighted(_state(text, encoded, self._layer), filled, restores_mean=self._emphasis != NO_NORM)
            states.append(state.reshape(1, -1, state.shape[-1]))
            # Of a prompt in several chunks the first one's vector counts, as in A1111.
            if text.is_pooled:
                assert encoded.text_embeds is not None
                pooled = encoded.text_embeds[:1].to(self._checkpoint.dtype)
        return Conditioning(torch.cat(states, dim=-1).to(self._checkpoint.dtype), pooled)


def _state(text: TextPart, encoded: TextStates, layer: int) -> Tensor:
    """(chunks, L, C) of the chosen layer; of layers before the last, SD takes the normalized states."""
    place = layer + 1 if text.is_penultimate else layer
    assert 0 < place < len(encoded.hidden_states), "a request's layer is checked against the checkpoint's recipe"
    if text.is_penultimate:
        return encoded.hidden_states[-place]
    if place == 1:
        return encoded.last_hidden_state
    state = encoded.hidden_states[-place]
    normalized: Tensor = text.encoder.final_layer_norm(state)
    return normalized


def _weighted(states: Tensor, chunks: Sequence[PromptChunk], *, restores_mean: bool) -> Tensor:
    """States (chunks, L, C), each token's times its weight, then each chunk's mean restored.

    As A1111's modules/sd_emphasis.py: `Original`, and `No norm` without the mean.
    """
    weighted = []
    for state, chunk in zip(states, chunks, strict=True):
        if not chunk.is_weighted:
            weighted.append(state)
            continue
        column = state.new_ones(len(state), 1)
        column[1 : 1 + len(chunk.ids), 0] = state.new_tensor(chunk.weights)
        scaled = state * column
        weighted.append(scaled * _mean_ratio(state, scaled) if restores_mean else scaled)
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
