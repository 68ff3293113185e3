"""Prompts to what the UNet looks at, with the checkpoint's one or two CLIPs. A long prompt is encoded in parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fanlight.contract.prompt import read_prompt
from services.diffusion.models.clip import TextStates
from services.diffusion.models.loading import Checkpoint, TextPart
from services.diffusion.prompt.tokens import Part, to_parts

# Of the numbers' size, what a mean must have to be one; CLIP's states have a hundredth and more.
_MEAN_FLOOR = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """`words` (1, L, C); `pooled` (1, P), the whole prompt in one vector, where the checkpoint looks at it (SDXL)."""

    words: Tensor
    pooled: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


def encode_pair(
    checkpoint: Checkpoint, prompt: str, negative: str, *, layer: int = 1
) -> tuple[Conditioning, Conditioning]:
    """The prompt and the negative one, of one length: the shorter is filled up with empty parts.

    Checkpoints that were trained with zeros for no prompt (SDXL base) get zeros for an empty negative one.
    `layer`: counted from the encoder's end; 1 is the one that the checkpoint was trained with. As in diffusers'
    pipelines it is the prompt's alone.
    """
    wanted, unwanted = _parts(checkpoint, prompt, "prompt"), _parts(checkpoint, negative, "negative_prompt")
    count = max(len(parts) for parts in (*wanted, *unwanted))
    high, low = _encode(checkpoint, wanted, count, layer), _encode(checkpoint, unwanted, count, 1)
    if checkpoint.entry.zeroes_empty_negative and not negative:
        low = Conditioning(torch.zeros_like(low.words), None if low.pooled is None else torch.zeros_like(low.pooled))
    return high, low


def encode_one(checkpoint: Checkpoint, prompt: str, *, layer: int = 1) -> Conditioning:
    parts = _parts(checkpoint, prompt, "prompt")
    return _encode(checkpoint, parts, max(len(own) for own in parts), layer)


def _parts(checkpoint: Checkpoint, words: str, field: str) -> list[list[Part]]:
    """For each text encoder its own."""
    prompt = read_prompt(words, field)
    return [to_parts(text, prompt, field) for text in checkpoint.texts]


def _encode(checkpoint: Checkpoint, parts: Sequence[list[Part]], count: int, layer: int) -> Conditioning:
    """The encoders' states lie side by side; the last one's pooled vector counts."""
    states: list[Tensor] = []
    pooled: Tensor | None = None
    for text, own in zip(checkpoint.texts, parts, strict=True):
        filled = own + [Part([], [])] * (count - len(own))
        ids = torch.tensor([_marked(text, part.ids) for part in filled], device=checkpoint.device)
        said: TextStates = text.encoder(ids)
        state = _weighted(_state(text, said, layer), filled)
        states.append(state.reshape(1, -1, state.shape[-1]))
        # Of a prompt in several parts the first one's vector counts, as in A1111.
        if text.is_pooled:
            assert said.text_embeds is not None
            pooled = said.text_embeds[:1].to(checkpoint.dtype)
    return Conditioning(torch.cat(states, dim=-1).to(checkpoint.dtype), pooled)


def _state(text: TextPart, said: TextStates, layer: int) -> Tensor:
    """(parts, L, C) of the layer that counts; of earlier ones than the last, SD takes the normalised states."""
    place = layer + 1 if text.is_penultimate else layer
    assert place < len(said.hidden_states), "a request's layer is checked against the checkpoint's recipe"
    if place == 1:
        return said.last_hidden_state
    state = said.hidden_states[-place]
    if text.is_penultimate:
        return state
    normalised: Tensor = text.encoder.final_layer_norm(state)
    return normalised


def _weighted(states: Tensor, parts: Sequence[Part]) -> Tensor:
    """Each token's state times its weight, then each part's mean as it was, as A1111 does."""
    weighted = []
    for state, part in zip(states, parts, strict=True):
        if not part.is_weighted:
            weighted.append(state)
            continue
        column = state.new_ones(len(state), 1)
        column[1 : 1 + len(part.ids), 0] = state.new_tensor(part.weights)
        scaled = state * column
        weighted.append(scaled * _restored(state, scaled))
    return torch.stack(weighted)


def _restored(state: Tensor, scaled: Tensor) -> float:
    """What brings the mean back; 1 where it is nothing but the rounding of numbers that add up to 0."""
    wanted, mean = float(state.float().mean()), float(scaled.float().mean())
    is_told = abs(mean) > float(scaled.float().abs().mean()) * _MEAN_FLOOR
    return wanted / mean if is_told else 1.0


def _marked(text: TextPart, part: list[int]) -> list[int]:
    """Start mark, the part, end mark, padding: what the tokenizer itself makes of a short prompt."""
    tokenizer = text.tokenizer
    row = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (text.positions - len(row))
