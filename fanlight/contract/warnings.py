"""Warnings: sentences about what was done otherwise than a request may have meant. An answer holds a few short ones."""

from collections.abc import Iterable

WARNINGS_LIMIT = 16
WARNING_CHARACTERS_LIMIT = 500


def bounded_warnings(sentences: Iterable[str]) -> tuple[str, ...]:
    """Each once, in order, each cut to its limit; where there are more than an answer takes, the last one says so."""
    distinct = list(dict.fromkeys(_cut(each) for each in sentences if each))
    if len(distinct) <= WARNINGS_LIMIT:
        return tuple(distinct)
    shown = distinct[: WARNINGS_LIMIT - 1]
    return (*shown, f"{len(distinct) - len(shown)} more warnings are not shown")


def _cut(sentence: str) -> str:
    if len(sentence) <= WARNING_CHARACTERS_LIMIT:
        return sentence
    return f"{sentence[: WARNING_CHARACTERS_LIMIT - 1]}…"
