"""From a read prompt to chunks of tokens that fit a text encoder. Loads no torch, encodes nothing."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fanlight.contract.limits import PROMPT_PARTS_LIMIT
from fanlight.contract.prompt import PromptParts, PromptSegment
from fanlight.errors import InvalidField

# A1111's default.
COMMA_BACKTRACK_TOKENS = 20


class PromptTokenizer(Protocol):
    """What a prompt needs of a tokenizer; models/tokenizer.py has CLIP's."""

    @property
    def bos_token_id(self) -> int: ...

    @property
    def eos_token_id(self) -> int: ...

    @property
    def pad_token_id(self) -> int: ...

    @property
    def comma_token_id(self) -> int | None:
        """Of a comma at a word's end; None where the vocabulary has none."""
        ...

    def ids(self, words: str) -> list[int]:
        """Without the marks at both ends; of any length."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """One of a checkpoint's text encoders, and what the checkpoint takes from it."""

    tokenizer: PromptTokenizer
    encoder: Any
    # The states before the last layer, not normalized (SDXL), instead of the last ones.
    is_penultimate: bool = False
    # Its `text_embeds` are the prompt's pooled vector (the last encoder of SDXL).
    is_pooled: bool = False
    # By name, the ids that textual inversions added to its embedding table.
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """How many tokens it takes at once, its two marks included."""
        positions: int = self.encoder.config.max_position_embeddings
        return positions

    @property
    def rows(self) -> int:
        """How many tokens it has vectors for, with those of textual inversions."""
        known: int = self.encoder.embeddings.token_embedding.weight.shape[0]
        return known + sum(map(len, self.added.values()))


class PromptChunk(NamedTuple):
    """What the encoder takes at once beside its two marks. `weights` has one for each of `ids`."""

    ids: list[int]
    weights: list[float]

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1.0 for weight in self.weights)


class _Piece(NamedTuple):
    """Tokens that stay together: one, or those of an embedding."""

    ids: tuple[int, ...]
    weight: float
    is_comma: bool = False


def to_chunks(text: TextPart, parts: PromptParts, field: str) -> list[PromptChunk]:
    """At least one chunk, which may be empty. InvalidField for a prompt of too many tokens.

    As A1111's modules/sd_hijack_clip.py: what follows a comma near a chunk's end goes on in the next chunk, as long as
    that does not take too many; a BREAK at the end adds no chunk.
    """
    room = text.positions - 2
    pieces = [[*_pieces(text, segments)] for segments in parts]
    chunks = _fill(pieces, room, backtrack=COMMA_BACKTRACK_TOKENS)
    if len(chunks) > PROMPT_PARTS_LIMIT:
        chunks = _fill(pieces, room, backtrack=0)
    if len(chunks) > PROMPT_PARTS_LIMIT:
        raise InvalidField(
            f"fills {len(chunks)} parts of {room} tokens; at most {PROMPT_PARTS_LIMIT} are taken", field=field
        )
    return chunks


def _fill(parts: Sequence[Sequence[_Piece]], room: int, *, backtrack: int) -> list[PromptChunk]:
    """`backtrack`: how many tokens behind a comma may move to the next chunk, so that they stay together."""
    chunks: list[PromptChunk] = []
    for pieces in parts:
        chunks.append(PromptChunk([], []))
        # Where the last comma of the chunk stands.
        comma = -1
        for piece in pieces:
            chunk = chunks[-1]
            if len(chunk.ids) + len(piece.ids) > room:
                is_full = len(chunk.ids) == room and not piece.is_comma
                cut = comma + 1 if is_full and comma >= 0 and room - comma <= backtrack else len(chunk.ids)
                chunks.append(PromptChunk(chunk.ids[cut:], chunk.weights[cut:]))
                del chunk.ids[cut:], chunk.weights[cut:]
                comma = -1
                if chunks[-1].ids and len(chunks[-1].ids) + len(piece.ids) > room:
                    chunks.append(PromptChunk([], []))
                chunk = chunks[-1]
            if piece.is_comma:
                comma = len(chunk.ids)
            chunk.ids.extend(piece.ids)
            chunk.weights.extend([piece.weight] * len(piece.ids))
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()
    return chunks


def embedding_pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Finds one of the names, as a whole word in any case, the longest that fits."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def _pieces(text: TextPart, segments: tuple[PromptSegment, ...]) -> Iterator[_Piece]:
    for segment in segments:
        for words, embedding in _around_embeddings(text, segment.text):
            comma = text.tokenizer.comma_token_id
            yield from (_Piece((each,), segment.weight, each == comma) for each in text.tokenizer.ids(words))
            if embedding:
                yield _Piece(embedding, segment.weight)


def _around_embeddings(text: TextPart, words: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Words, and the ids of the embedding that follows them; no ids after the last words."""
    names = {name.lower(): ids for name, ids in text.added.items()}
    end = 0
    for match in embedding_pattern(list(names)).finditer(words) if names else ():
        yield words[end : match.start()], names[match.group().lower()]
        end = match.end()
    yield words[end:], ()
