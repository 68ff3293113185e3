"""Prompts to embeddings with the checkpoint's own CLIP. A prompt longer than the encoder takes is encoded in parts."""

from typing import Any

import torch
from torch import Tensor

from services.diffusion.models.loading import Checkpoint
from services.kernel.errors import InvalidField

PARTS_LIMIT = 16


def encode_pair(checkpoint: Checkpoint, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt and of the negative one, both (1, L, C): the shorter is filled up with empty parts."""
    wanted, unwanted = _parts(checkpoint, prompt, "prompt"), _parts(checkpoint, negative, "negative_prompt")
    count = max(len(wanted), len(unwanted))
    return _encode(checkpoint, wanted, count), _encode(checkpoint, unwanted, count)


def encode_one(checkpoint: Checkpoint, prompt: str) -> Tensor:
    """Embeddings of the prompt, (1, L, C)."""
    parts = _parts(checkpoint, prompt, "prompt")
    return _encode(checkpoint, parts, len(parts))


def _parts(checkpoint: Checkpoint, text: str, field: str) -> list[list[int]]:
    """Token ids in parts that fit the encoder beside its two marks; at least one part, which may be empty."""
    ids: list[int] = checkpoint.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    room = _positions(checkpoint) - 2
    if len(ids) > room * PARTS_LIMIT:
        raise InvalidField(f"has {len(ids)} tokens; at most {room * PARTS_LIMIT} are taken", field=field)
    return [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]


def _encode(checkpoint: Checkpoint, parts: list[list[int]], count: int) -> Tensor:
    filled = parts + [[]] * (count - len(parts))
    ids = torch.tensor([_marked(checkpoint, part) for part in filled], device=checkpoint.device)
    states: Tensor = checkpoint.text_encoder(ids)[0]
    return states.reshape(1, -1, states.shape[-1]).to(checkpoint.dtype)


def _marked(checkpoint: Checkpoint, part: list[int]) -> list[int]:
    """Start mark, the part, end mark, padding: what the tokenizer itself makes of a short prompt."""
    tokenizer: Any = checkpoint.tokenizer
    row = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (_positions(checkpoint) - len(row))


def _positions(checkpoint: Checkpoint) -> int:
    positions: int = checkpoint.text_encoder.config.max_position_embeddings
    return positions
