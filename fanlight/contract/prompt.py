"""Parses A1111's prompt syntax. No tokens, no torch; a syntax error names its place in the prompt.

`(more)` and `[less]`, `(so much:1.3)`, `\\(` for a bracket itself, `BREAK` for a new part, `<lora:name:weight>`.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from fanlight.contract.limits import (
    LORA_WEIGHT_LIMIT,
    LORAS_LIMIT,
    PART_TOKENS,
    PROMPT_CHARACTERS_LIMIT,
    PROMPT_DEPTH_LIMIT,
    PROMPT_PARTS_LIMIT,
    PROMPT_WEIGHT_LIMIT,
    check_characters,
    format_number,
)
from fanlight.errors import InvalidField

MORE, LESS = 1.1, 1 / 1.1

_TOKEN = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\<>])
    | (?P<tag><(?P<kind>lora|lyco|hypernet):(?P<inner>[^<>]*)(?P<end>>?))
    | (?P<break>\bBREAK\b)
    | (?P<and>\bAND\b)
    | (?P<open>[(\[])
    | (?P<weight>:\s*(?P<number>[-+.,\d][^\s()\[\]\\:]*|(?i:nan|inf|infinity)|)\s*\))
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:<BA]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
# A1111's `[from:to:when]` and `[a|b]`.
_EDITING = re.compile(r":\s*[\d.]+\s*$|\|")
_PAIRS = {"(": ")", "[": "]"}
_WORD = re.compile(r"\w+")
# Unicode's spaces, as in CLIP's tokenizer; Python also counts four control characters.
_SPACES = re.compile(r"[^\S\x1c-\x1f]+")


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """Text with one weight."""

    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class LoraTag:
    name: str
    unet_weight: float
    text_weight: float
    # Its start and end in the prompt, counted from 0.
    at: int
    end: int


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    # Between two BREAKs, segments in order; at least one part, which may have none.
    parts: tuple[tuple[PromptSegment, ...], ...]
    loras: tuple[LoraTag, ...]


class _Open:
    """A bracket that is not closed yet; `first`: the segments from here on are in it."""

    def __init__(self, bracket: str, at: int, first: int) -> None:
        self.bracket = bracket
        self.at = at
        self.first = first


# A prompt is parsed several times between a request and its tasks; a cached one may take a megabyte.
PARSED_PROMPTS_CACHED = 16


@lru_cache(maxsize=PARSED_PROMPTS_CACHED)
def parse_prompt(text: str, field: str) -> ParsedPrompt:
    """InvalidField about the field, which names the character, counted from 1."""
    return _Parser(text, field).parse()


def check_prompt(text: str, field: str) -> ParsedPrompt:
    """The parsed prompt. TooLarge for more than 10,000 characters, InvalidField for a mistake or too many parts."""
    check_characters(text, PROMPT_CHARACTERS_LIMIT, field=field)
    parsed = parse_prompt(text, field)
    if (parts := most_parts(parsed)) > PROMPT_PARTS_LIMIT:
        raise InvalidField(
            f"may fill {parts} parts of {PART_TOKENS} tokens; at most {PROMPT_PARTS_LIMIT} are taken: shorten it, "
            "or use fewer BREAKs",
            field=field,
        )
    return parsed


def most_parts(prompt: ParsedPrompt) -> int:
    """An upper bound of the parts of 75 tokens that the prompt fills, whatever the vocabulary of the CLIP encoder.

    A byte-level token has at least one byte of the text as CLIP normalizes it, and each BREAK begins a part. Embeddings
    may add to it: only the worker knows how many vectors one has.
    """
    return sum(max(1, math.ceil(_normalized_bytes(part) / PART_TOKENS)) for part in prompt.parts)


def _normalized_bytes(part: tuple[PromptSegment, ...]) -> int:
    """Of the text in UTF-8, without spaces: as CLIP's tokenizer normalizes it, NFC and lower case."""
    texts = (segment.text if segment.text.isascii() else _normalized(segment.text) for segment in part)
    return sum(len(_SPACES.sub("", text).encode()) for text in texts)


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


def loras_in(prompt: str) -> list[str]:
    """The LoRAs that a prompt names, in order. InvalidField, field `prompt`, for a prompt that cannot be parsed."""
    return [tag.name for tag in parse_prompt(prompt, "prompt").loras]


def with_loras_renamed(prompt: str, rename: Callable[[str], str]) -> str:
    """The prompt with each LoRA renamed by `rename`. InvalidField for a prompt that cannot be parsed.

    Also for a new name that a tag cannot hold, and for a prompt that becomes too long.
    """
    pieces, end = [], 0
    for tag in parse_prompt(prompt, "prompt").loras:
        name_at = prompt.index(":", tag.at) + 1
        name = rename(tag.name)
        if not name or any(mark in name for mark in ":<>"):
            raise InvalidField(
                f"character {tag.at + 1}: the LoRA's id {name!r} cannot stand in a tag; list it in loras instead",
                field="prompt",
            )
        pieces += [prompt[end:name_at], name]
        end = next(at for at in range(name_at, tag.end) if prompt[at] in ":>")
    renamed = "".join([*pieces, prompt[end:]])
    if len(renamed) > PROMPT_CHARACTERS_LIMIT:
        raise InvalidField(
            f"has {len(renamed)} characters with its LoRAs named by their ids; at most {PROMPT_CHARACTERS_LIMIT} are"
            " taken: shorten it, or list them in loras",
            field="prompt",
        )
    return renamed


def without_loras(prompt: str, tags: Iterable[LoraTag]) -> str:
    """The prompt without these of its LoRA tags, in order."""
    pieces, end = [], 0
    for tag in tags:
        pieces.append(prompt[end : tag.at])
        end = tag.end
    return "".join([*pieces, prompt[end:]]).strip() if end else prompt


def words_in(text: str, names: Iterable[str]) -> list[str]:
    """The names that occur in the text as whole words, in any case, as embeddings do in prompts."""
    words = frozenset(_WORD.findall(text.lower()))
    perhaps = (name for name in names if words.issuperset(_WORD.findall(name.lower())))
    return [name for name in perhaps if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)]


class _Parser:
    def __init__(self, text: str, field: str) -> None:
        self._text = text
        self._field = field
        # Each with its weight so far; None is a BREAK.
        self._segments: list[tuple[str, float] | None] = []
        self._open: list[_Open] = []
        self._loras: list[LoraTag] = []

    def parse(self) -> ParsedPrompt:
        for match in _TOKEN.finditer(self._text):
            self._take(match)
        if self._open:
            last = self._open[-1]
            self._refuse(last.at, f"{last.bracket!r} is never closed; for the bracket itself write '\\{last.bracket}'")
        return ParsedPrompt(tuple(_merged(part) for part in _split(self._segments)), tuple(self._loras))

    def _take(self, match: re.Match[str]) -> None:
        at = match.start()
        if match["escaped"] is not None:
            self._segments.append((match["escaped"], 1.0))
        elif match["tag"]:
            self._loras.append(self._lora(match))
        elif match["break"]:
            self._segments.append(None)
        elif match["and"]:
            self._refuse(at, "'AND' mixes several prompts in A1111, which is not offered; write it in lower case")
        elif match["open"]:
            self._push(match["open"], at)
        elif match["weight"] is not None:
            self._weighted(match)
        elif match["close"]:
            self._close(match["close"], at)
        else:
            self._segments.append((match["text"], 1.0))

    def _push(self, bracket: str, at: int) -> None:
        if len(self._open) == PROMPT_DEPTH_LIMIT:
            self._refuse(at, f"is bracket {PROMPT_DEPTH_LIMIT + 1} within others; at most {PROMPT_DEPTH_LIMIT}")
        self._open.append(_Open(bracket, at, len(self._segments)))

    def _weighted(self, match: re.Match[str]) -> None:
        """A colon, what may be a number, and a closing bracket."""
        if not self._open or self._open[-1].bracket != "(":
            self._segments.append((match["weight"][:-1], 1.0))
            self._close(")", match.end() - 1)
            return
        weight = self._number(match["number"], match.start("number"), PROMPT_WEIGHT_LIMIT)
        self._scale(self._open.pop().first, weight)

    def _close(self, bracket: str, at: int) -> None:
        if not self._open or _PAIRS[self._open[-1].bracket] != bracket:
            self._refuse(at, f"{bracket!r} closes nothing; for the bracket itself write '\\{bracket}'")
        opened = self._open.pop()
        if opened.bracket == "[" and _EDITING.search(self._text[opened.at + 1 : at]):
            self._refuse(opened.at, "'[from:to:when]' and '[a|b]' change a prompt on the way, which is not offered")
        self._scale(opened.first, MORE if bracket == ")" else LESS)

    def _scale(self, first: int, by: float) -> None:
        inside = self._segments[first:]
        self._segments[first:] = [each and (each[0], each[1] * by) for each in inside]

    def _lora(self, match: re.Match[str]) -> LoraTag:
        at = match.start()
        if not match["end"]:
            self._refuse(at, f"'<{match['kind']}:' is never closed by a '>'")
        if match["kind"] == "hypernet":
            self._refuse(at, "hypernetworks are not offered")
        if len(self._loras) == LORAS_LIMIT:
            self._refuse(at, f"is one LoRA too many; at most {LORAS_LIMIT}")
        name, *weights = match["inner"].split(":")
        if not name.strip() or len(weights) > 2:
            self._refuse(at, "is not '<lora:name:weight>' or '<lora:name:weight:text encoder weight>'")
        numbers = [self._number(weight, at, LORA_WEIGHT_LIMIT) for weight in weights] or [1.0]
        return LoraTag(name.strip(), numbers[0], numbers[-1], at, match.end())

    def _number(self, text: str, at: int, limit: float) -> float:
        try:
            number = float(text)
        except ValueError:
            self._refuse(at, f"{text.strip()[:40]!r} is not a weight such as 1.2")
        if not math.isfinite(number) or abs(number) > limit:
            self._refuse(at, f"the weight is {format_number(number)}; must be {-limit:g} to {limit:g}")
        return number

    def _refuse(self, at: int, message: str) -> NoReturn:
        raise InvalidField(f"character {at + 1}: {message}", field=self._field)


def _split(segments: list[tuple[str, float] | None]) -> Iterator[list[tuple[str, float]]]:
    part: list[tuple[str, float]] = []
    for segment in segments:
        if segment is None:
            yield part
            part = []
        else:
            part.append(segment)
    yield part


def _merged(part: list[tuple[str, float]]) -> tuple[PromptSegment, ...]:
    """Joins adjacent segments of equal weight, so that words are not split before they are tokenized."""
    merged: list[PromptSegment] = []
    for text, weight in part:
        if merged and merged[-1].weight == weight:
            merged[-1] = PromptSegment(merged[-1].text + text, weight)
        else:
            merged.append(PromptSegment(text, weight))
    return tuple(segment for segment in merged if segment.text.strip())
