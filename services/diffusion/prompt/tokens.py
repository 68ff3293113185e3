"""From a read prompt to parts of tokens that fit a text encoder."""

from collections.abc import Iterator
from typing import NamedTuple

from fanlight.contract.limits import PROMPT_PARTS_LIMIT
from fanlight.contract.prompt import ReadPrompt, Segment
from fanlight.errors import InvalidField
from services.diffusion.models.loading import TextPart
from services.diffusion.prompt.words import embedding_pattern


class Part(NamedTuple):
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


def to_parts(text: TextPart, prompt: ReadPrompt, field: str) -> list[Part]:
    """At least one part, which may be empty. InvalidField for a prompt of too many tokens."""
    room = text.positions - 2
    parts: list[Part] = []
    for segments in prompt.parts:
        parts.append(Part([], []))
        for piece in _pieces(text, segments):
            if len(parts[-1].ids) + len(piece.ids) > room:
                parts.append(Part([], []))
            parts[-1].ids.extend(piece.ids)
            parts[-1].weights.extend([piece.weight] * len(piece.ids))
    if len(parts) > PROMPT_PARTS_LIMIT:
        raise InvalidField(
            f"fills {len(parts)} parts of {room} tokens; at most {PROMPT_PARTS_LIMIT} are taken", field=field
        )
    return parts


def _pieces(text: TextPart, segments: tuple[Segment, ...]) -> Iterator[_Piece]:
    for segment in segments:
        for words, embedding in _around_embeddings(text, segment.text):
            yield from (_Piece((each,), segment.weight) for each in text.tokenizer.ids(words))
            if embedding:
                yield _Piece(embedding, segment.weight)


def _around_embeddings(text: TextPart, words: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Words, and the embedding's tokens that come after them; none after the last."""
    names = {name.lower(): ids for name, ids in text.added.items()}
    end = 0
    for match in embedding_pattern(list(names)).finditer(words) if names else ():
        yield words[end : match.start()], names[match.group().lower()]
        end = match.end()
    yield words[end:], ()
