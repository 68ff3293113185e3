"""Prompts to what the UNet looks at, with the checkpoint's one or two CLIPs. A long prompt is encoded in parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.diffusion.models.loading import Checkpoint, TextPart
from services.kernel.errors import InvalidField

PARTS_LIMIT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """`words` (1, L, C); `pooled` (1, P), the whole prompt in one vector, where the checkpoint looks at it (SDXL)."""

    words: Tensor
    pooled: Tensor | None = None


def encode_pair(checkpoint: Checkpoint, prompt: str, negative: str) -> tuple[Conditioning, Conditioning]:
    """The prompt and the negative one, of one length: the shorter is filled up with empty parts.

    Checkpoints that were trained with zeros for no prompt (SDXL base) get zeros for an empty negative one.
    """
    wanted, unwanted = (
        [_parts(text, words, field) for text in checkpoint.texts]
        for words, field in ((prompt, "prompt"), (negative, "negative_prompt"))
    )
    count = max(len(wanted[0]), len(unwanted[0]))
    high, low = _encode(checkpoint, wanted, count), _encode(checkpoint, unwanted, count)
    if checkpoint.entry.zeroes_empty_negative and not negative:
        low = Conditioning(torch.zeros_like(low.words), None if low.pooled is None else torch.zeros_like(low.pooled))
    return high, low


def encode_one(checkpoint: Checkpoint, prompt: str) -> Conditioning:
    parts = [_parts(text, prompt, "prompt") for text in checkpoint.texts]
    return _encode(checkpoint, parts, len(parts[0]))


def _parts(text: TextPart, words: str, field: str) -> list[list[int]]:
    """Token ids in parts that fit the encoder beside its two marks; at least one part, which may be empty."""
    ids: list[int] = text.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    room = text.positions - 2
    if len(ids) > room * PARTS_LIMIT:
        raise InvalidField(f"has {len(ids)} tokens; at most {room * PARTS_LIMIT} are taken", field=field)
    return [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]


def _encode(checkpoint: Checkpoint, parts: Sequence[list[list[int]]], count: int) -> Conditioning:
    """`parts`: for each text encoder its own. Their states lie side by side; the last one's pooled vector counts."""
    states: list[Tensor] = []
    pooled: Tensor | None = None
    for text, own in zip(checkpoint.texts, parts, strict=True):
        filled = own + [[]] * (count - len(own))
        ids = torch.tensor([_marked(text, part) for part in filled], device=checkpoint.device)
        said = text.encoder(ids, output_hidden_states=text.is_penultimate)
        state: Tensor = said.hidden_states[-2] if text.is_penultimate else said.last_hidden_state
        states.append(state.reshape(1, -1, state.shape[-1]))
        # Of a prompt in several parts the first one's vector counts, as in A1111.
        pooled = said.text_embeds[:1].to(checkpoint.dtype) if text.is_pooled else pooled
    return Conditioning(torch.cat(states, dim=-1).to(checkpoint.dtype), pooled)


def _marked(text: TextPart, part: list[int]) -> list[int]:
    """Start mark, the part, end mark, padding: what the tokenizer itself makes of a short prompt."""
    tokenizer: Any = text.tokenizer
    row = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (text.positions - len(row))
