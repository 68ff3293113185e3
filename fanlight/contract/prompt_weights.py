"""Reads the weights of a prompt's text at one step: `(more)`, `[less]`, `(so much:1.3)`, `\\(`, `BREAK`.

As A1111's modules/prompt_parser.py: round and square brackets are counted apart, one that is never closed counts to the
end, one that closes nothing is text. Deeper ones than PROMPT_DEPTH_LIMIT do not count, so that it takes linear time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fanlight.contract.limits import PROMPT_DEPTH_LIMIT, PROMPT_WEIGHT_LIMIT

MORE, LESS = 1.1, 1 / 1.1
# How a prompt is read, and what its weights do; the first ones are the defaults of a request.
SYNTAXES = STRICT, FORGIVING, PLAIN = "strict", "a1111", "plain"
EMPHASES = ORIGINAL, NO_NORM, IGNORE, NONE = "original", "no_norm", "ignore", "none"

# What a backslash takes for text; A1111 leaves out any other backslash.
_ESCAPED = {STRICT: r"()\[\]\\<>:|", FORGIVING: r"()\[\]\\"}
_TOKEN = r"""
    \\(?P<escaped>[ESCAPED])
    | (?P<backslash>\\)
    | (?P<open>[(\[])
    | :\s*(?P<number>[-+]?[.\d]+)\s*\)
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+|:)
    """
_TOKENS = {syntax: re.compile(_TOKEN.replace("ESCAPED", marks), re.VERBOSE) for syntax, marks in _ESCAPED.items()}
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """Text with one weight."""

    text: str
    weight: float


# Between two BREAKs, segments in order; at least one part, which may have none.
PromptParts = tuple[tuple[PromptSegment, ...], ...]
# Texts of prompts that are read at a time; one may take a megabyte.
READ_TEXTS_CACHED = 32


@lru_cache(maxsize=READ_TEXTS_CACHED)
def read_weights(text: str, syntax: str = STRICT, emphasis: str = ORIGINAL) -> PromptParts:
    """Of a prompt without tags and changes. With syntax PLAIN or, as in A1111, emphasis NONE all of it is text."""
    if syntax == PLAIN or emphasis == NONE:
        return (_merged([(text, 1.0)]),)
    segments = _Reader(syntax).read(text)
    if emphasis == IGNORE:
        segments = [segment and (segment[0], 1.0) for segment in segments]
    return tuple(_merged(part) for part in _split(segments))


def to_weight(text: str) -> float | None:
    """None for what A1111 takes as text, such as `1.2.3`."""
    try:
        return float(text)
    except ValueError:
        return None


class _Reader:
    def __init__(self, syntax: str) -> None:
        self._tokens = _TOKENS[syntax]
        self._keeps_backslashes = syntax == STRICT
        # Each with its weight so far; None is a BREAK.
        self._segments: list[tuple[str, float] | None] = []
        # By bracket, the first segment in each that is open; None for one that does not count.
        self._open: dict[str, list[int | None]] = {"(": [], "[": []}
        self._depth = 0

    def read(self, text: str) -> list[tuple[str, float] | None]:
        for match in self._tokens.finditer(text):
            self._take(match)
        for bracket, factor in (("(", MORE), ("[", LESS)):
            for first in self._open[bracket]:
                self._scale(first, factor)
        return self._segments

    def _take(self, match: re.Match[str]) -> None:
        if match["escaped"] is not None:
            self._segments.append((match["escaped"], 1.0))
        elif match["backslash"]:
            self._segments.append(("\\" if self._keeps_backslashes else "", 1.0))
        elif match["open"]:
            counts = self._depth < PROMPT_DEPTH_LIMIT
            self._depth += 1
            self._open[match["open"]].append(len(self._segments) if counts else None)
        elif match["number"] is not None and self._open["("] and (weight := to_weight(match["number"])) is not None:
            self._close("(", max(-PROMPT_WEIGHT_LIMIT, min(PROMPT_WEIGHT_LIMIT, weight)))
        elif match["number"] is not None:
            self._text(match.group()[:-1])
            self._bracket(")")
        elif match["close"]:
            self._bracket(match["close"])
        else:
            self._text(match["text"])

    def _bracket(self, bracket: str) -> None:
        """A closing one without a number."""
        opening, factor = ("(", MORE) if bracket == ")" else ("[", LESS)
        if self._open[opening]:
            self._close(opening, factor)
        else:
            self._segments.append((bracket, 1.0))

    def _close(self, opening: str, factor: float) -> None:
        self._depth -= 1
        self._scale(self._open[opening].pop(), factor)

    def _scale(self, first: int | None, by: float) -> None:
        if first is not None:
            inside = self._segments[first:]
            self._segments[first:] = [each and (each[0], each[1] * by) for each in inside]

    def _text(self, text: str) -> None:
        for number, part in enumerate(_BREAK.split(text)):
            if number:
                self._segments.append(None)
            self._segments.append((part, 1.0))


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
    merged: list[tuple[list[str], float]] = []
    for text, weight in part:
        if merged and merged[-1][1] == weight:
            merged[-1][0].append(text)
        elif text:
            merged.append(([text], weight))
    joined = (PromptSegment("".join(texts), weight) for texts, weight in merged)
    return tuple(segment for segment in joined if segment.text.strip())
