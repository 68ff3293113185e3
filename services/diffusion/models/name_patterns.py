"""Matches PEFT's patterns of layers' names, which are regular expressions of strangers, in bounded work. No torch.

Python's own engine may take years for such a pattern. Here a pattern maps the set of positions where it may begin to
the set of those where it may end; a set is an integer with one bit for each position.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

PATTERN_CHARACTERS_LIMIT = 500
PATTERN_DEPTH_LIMIT = 20
REPEATS_LIMIT = 100
# Sets that are followed by one character, for all patterns and names of one file; a second's work.
STEPS_LIMIT = 1_000_000
# For how many patterns what was read of them is kept.
PATTERNS_CACHED = 4_096


class BadPattern(ValueError):
    """A pattern that is no regular expression, or one of a kind that is not read here; the message says which."""


@dataclass(slots=True, kw_only=True)
class PatternWork:
    """What the patterns of one file have cost so far."""

    steps: int = 0

    def count(self) -> None:
        self.steps += 1
        if self.steps > STEPS_LIMIT:
            raise BadPattern(f"its patterns of names take more than {STEPS_LIMIT} steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    characters: str
    work: PatternWork
    # By the source of a class of characters, the positions of those that are of it.
    places: dict[str, int] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return len(self.characters)

    def of_class(self, source: str) -> int:
        if source not in self.places:
            fits = re.compile(source).fullmatch
            self.places[source] = sum(1 << at for at, each in enumerate(self.characters) if fits(each))
        return self.places[source]

    def is_word(self, at: int) -> bool:
        return 0 <= at < self.end and bool(self.of_class(r"\w") >> at & 1)


# From the positions where a match may begin to those where it may end.
Ends = Callable[[_Text, int], int]
_Holds = Callable[[_Text, int], bool]
_QUANTIFIER = re.compile(r"(?:([*+?])|\{(\d*)(?:(,)(\d*))?\})[?+]?")
_PLAIN = re.compile(r"[\w.]+")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ANCHORS: Mapping[str, _Holds] = {
    "^": lambda text, at: at == 0,
    "$": lambda text, at: at == text.end or text.characters[at:] == "\n",
    r"\A": lambda text, at: at == 0,
    r"\Z": lambda text, at: at == text.end,
    r"\b": lambda text, at: text.is_word(at - 1) != text.is_word(at),
    r"\B": lambda text, at: text.is_word(at - 1) == text.is_word(at),
}


@lru_cache(maxsize=PATTERNS_CACHED)
def read_pattern(pattern: str) -> Callable[[str, PatternWork], bool]:
    """Whether a name is one that PEFT's `re.match(rf"(.*\\.)?({pattern})$", name)` finds. BadPattern."""
    if len(pattern) > PATTERN_CHARACTERS_LIMIT:
        raise BadPattern(f"a pattern has {len(pattern)} characters; at most {PATTERN_CHARACTERS_LIMIT} are read")
    if _PLAIN.fullmatch(pattern):
        return _plain_matcher(pattern)
    ends = _Reader(pattern).read()

    def matches(name: str, work: PatternWork) -> bool:
        text = _Text(characters=name, work=work)
        return bool(ends(text, 1 | text.of_class(r"\.") << 1) >> text.end & 1)

    return matches


def _plain_matcher(pattern: str) -> Callable[[str, PatternWork], bool]:
    """Of a part of a name, in which a dot stands for any character."""
    tail = pattern.rpartition(".")[2]
    whole = re.compile(rf"(?:.*\.)?{pattern}")
    return lambda name, work: name.endswith(tail) and whole.fullmatch(name) is not None


def first_match(patterns: Mapping[str, float], name: str, work: PatternWork) -> float | None:
    """The value of the first pattern that matches, in the mapping's order; None where none does. BadPattern."""
    return next((value for pattern, value in patterns.items() if read_pattern(pattern)(name, work)), None)


class _Reader:
    """Reads one pattern: alternatives of sequences of repeated atoms."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def read(self) -> Ends:
        ends = self._alternatives()
        if self._at < len(self._pattern):
            self._refuse("has a ')' too many")
        return ends

    def _alternatives(self) -> Ends:
        self._depth += 1
        if self._depth > PATTERN_DEPTH_LIMIT:
            self._refuse(f"has more than {PATTERN_DEPTH_LIMIT} groups within each other")
        choices = [self._sequence()]
        while self._take("|"):
            choices.append(self._sequence())
        self._depth -= 1
        return choices[0] if len(choices) == 1 else _either(choices)

    def _sequence(self) -> Ends:
        parts = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            parts.append(self._repeated(self._atom()))
        return _in_order(parts)

    def _repeated(self, atom: Ends) -> Ends:
        while found := _QUANTIFIER.match(self._pattern, self._at):
            least, most = self._counts(found)
            if (most is not None and most < least) or least > REPEATS_LIMIT or (most or 0) > REPEATS_LIMIT:
                self._refuse(f"repeats {found[0]} times; at most {REPEATS_LIMIT} are counted")
            self._at = found.end()
            atom = _repeat(atom, least, most)
        return atom

    def _counts(self, found: re.Match[str]) -> tuple[int, int | None]:
        if found[1]:
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[1]]
        if not found[2] and not found[4]:
            self._refuse(f"has {found[0]!r}, which is no count")
        least = int(found[2] or 0)
        if found[3] is None:
            return least, least
        return least, int(found[4]) if found[4] else None

    def _atom(self) -> Ends:
        for mark, holds in _ANCHORS.items():
            if self._take(mark):
                return _where(holds)
        if self._take("("):
            return self._group()
        if found := _CLASS.match(self._pattern, self._at):
            return self._one_of(found[0])
        character = self._pattern[self._at]
        if character in "*+?[":
            self._refuse(f"has a {character!r} where nothing can be repeated or listed")
        if character != "\\":
            return self._one_of("." if character == "." else re.escape(character), len(character))
        escaped = self._pattern[self._at : self._at + 2]
        if len(escaped) < 2 or escaped[1].isdigit() or (escaped[1].isalpha() and escaped[1] not in "dDsSwWntr"):
            self._refuse(f"has {escaped!r}, which is not read")
        return self._one_of(escaped)

    def _group(self) -> Ends:
        kind = next((each for each in ("?:", "?=", "?!", "?") if self._take(each)), "")
        if kind == "?":
            self._refuse("has a group of a kind that is not read")
        inside = self._alternatives()
        if not self._take(")"):
            self._refuse("has a '(' that is never closed")
        if kind in ("?=", "?!"):
            return _where(lambda text, at: bool(inside(text, 1 << at)) == (kind == "?="))
        return inside

    def _one_of(self, source: str, length: int = 0) -> Ends:
        """One character of a class; `length`: of its text in the pattern where that differs."""
        self._at += length or len(source)
        try:
            re.compile(source)
        except (re.error, OverflowError) as error:
            self._refuse(f"has {source[:40]!r}, which is no class of characters", error)

        def ends(text: _Text, starts: int) -> int:
            text.work.count()
            return (starts & text.of_class(source)) << 1

        return ends

    def _take(self, mark: str) -> bool:
        if not self._pattern.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def _refuse(self, why: str, cause: Exception | None = None) -> NoReturn:
        raise BadPattern(f"the pattern {self._pattern[:80]!r} {why}") from cause


def _where(holds: _Holds) -> Ends:
    """Of the positions those where it holds."""

    def ends(text: _Text, starts: int) -> int:
        text.work.count()
        return sum(1 << at for at in range(text.end + 1) if starts >> at & 1 and holds(text, at))

    return ends


def _either(choices: list[Ends]) -> Ends:
    def ends(text: _Text, starts: int) -> int:
        reached = 0
        for choice in choices:
            reached |= choice(text, starts)
        return reached

    return ends


def _in_order(parts: list[Ends]) -> Ends:
    def ends(text: _Text, starts: int) -> int:
        for part in parts:
            starts = part(text, starts) if starts else 0
        return starts

    return ends


def _repeat(part: Ends, least: int, most: int | None) -> Ends:
    """`most`: None for any number."""

    def ends(text: _Text, starts: int) -> int:
        reached = starts
        for _ in range(least):
            text.work.count()
            reached = part(text, reached)
        new, left = reached, None if most is None else most - least
        while new and left != 0:
            text.work.count()
            new = part(text, new) & ~reached
            reached |= new
            left = None if left is None else left - 1
        return reached

    return ends
