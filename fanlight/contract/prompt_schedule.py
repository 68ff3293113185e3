"""Prompts that change from step to step: A1111's `[from:to:when]`, `[from::when]`, `[to:when]` and `[a|b]`.

Read as A1111's modules/prompt_parser.py reads them, but in linear time. Knows no weights: what is no change is text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

_MARK = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\", re.DOTALL)
_WHEN = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*", re.ASCII)
_PAIRS = {")": "(", "]": "["}


@dataclass(frozen=True, slots=True)
class Edit:
    """`before` up to a step, `after` from the next one on. `when`: as written; with a point a part of all steps."""

    before: "Template"
    after: "Template"
    when: str

    def end(self, steps: int) -> int:
        """The last step, counted from 1, that has `before`: of `steps` at most, below 1 for none."""
        number = float(self.when)
        if "." in self.when:
            number *= steps
        return int(max(-1.0, min(float(steps), number)))


@dataclass(frozen=True, slots=True)
class Alternation:
    """Another one of the options in each step; an option may be empty."""

    options: tuple["Template", ...]


Template = tuple["str | Edit | Alternation", ...]


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt whose text depends on the step."""

    items: Template
    # How many changes it has, and how many of them stand in one another.
    changes: int = 0
    depth: int = 0
    # Where, counted from 0, a square bracket looks like a change and is none, and why.
    faults: tuple[tuple[int, str], ...] = ()

    def text_at(self, step: int, steps: int) -> str:
        """`step`: from 1 to `steps`."""
        return "".join(_text(self.items, step, steps))

    def schedule(self, steps: int) -> tuple[tuple[int, str], ...]:
        """Each text with the last step that has it, in order; the last one's is `steps`, at least 1."""
        ends = sorted({steps, *_ends(self.items, steps)})
        return tuple((end, self.text_at(end, steps)) for end in ends)

    def outside(self, steps: int) -> list[str]:
        """`when` of the edits that come after the last of so many steps."""
        return [edit.when for edit in _edits(self.items) if edit.end(steps) >= steps]


def _edits(items: Template) -> Iterator[Edit]:
    for item in items:
        if isinstance(item, Edit):
            yield item
            yield from _edits(item.before)
            yield from _edits(item.after)
        elif isinstance(item, Alternation):
            for option in item.options:
                yield from _edits(option)


def _text(items: Template, step: int, steps: int) -> Iterator[str]:
    for item in items:
        if isinstance(item, str):
            yield item
        elif isinstance(item, Edit):
            yield from _text(item.before if step <= item.end(steps) else item.after, step, steps)
        else:
            yield from _text(item.options[(step - 1) % len(item.options)], step, steps)


def _ends(items: Template, steps: int) -> Iterator[int]:
    for item in items:
        if isinstance(item, Edit):
            if (end := item.end(steps)) >= 1:
                yield end
            yield from _ends(item.before, steps)
            yield from _ends(item.after, steps)
        elif isinstance(item, Alternation):
            yield from range(1, steps + 1)
            for option in item.options:
                yield from _ends(option, steps)


@dataclass(slots=True)
class _Frame:
    """A bracket that is not closed yet: its place among the items and in the text, and those of its own marks."""

    bracket: str
    start: int
    at: int
    colons: list[int] = field(default_factory=list)
    pipes: list[int] = field(default_factory=list)
    # No bracket in it is without its partner.
    is_sound: bool = True
    depth: int = 0


def parse_template(text: str) -> PromptTemplate:
    """Of any text: brackets without a partner, and square ones without a change, are text."""
    return _TemplateParser(text).parse()


class _TemplateParser:
    """Items lie in one list; a change replaces what it is made of, so that each item is moved once for each change."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._items: list[str | Edit | Alternation] = []
        self._frames: list[_Frame] = []
        self._changes = 0
        self._depth = 0
        self._faults: list[tuple[int, str]] = []

    def parse(self) -> PromptTemplate:
        for match in _MARK.finditer(self._text):
            self._take(match.group(), match.start())
        return PromptTemplate(tuple(self._items), self._changes, self._depth, tuple(self._faults))

    def _take(self, mark: str, at: int) -> None:
        if mark in _PAIRS:
            self._close(mark)
            return
        if mark in "([":
            self._frames.append(_Frame(mark, len(self._items), at))
        elif self._frames and mark == ":":
            self._frames[-1].colons.append(len(self._items))
        elif self._frames and mark == "|":
            self._frames[-1].pipes.append(len(self._items))
        self._items.append(mark)

    def _close(self, bracket: str) -> None:
        if not self._frames or self._frames[-1].bracket != _PAIRS[bracket]:
            if self._frames:
                self._frames[-1].is_sound = False
            self._items.append(bracket)
            return
        frame = self._frames.pop()
        change = self._change(frame) if bracket == "]" and frame.is_sound else None
        if change is None:
            self._items.append(bracket)
        else:
            del self._items[frame.start :]
            self._items.append(change)
            self._changes += 1
            frame.depth += 1
            self._depth = max(self._depth, frame.depth)
        if self._frames:
            parent = self._frames[-1]
            parent.depth = max(parent.depth, frame.depth)
            parent.is_sound &= frame.is_sound and (change is not None or not _is_half_a_change(frame))

    def _change(self, frame: _Frame) -> Edit | Alternation | None:
        when = self._when(frame)
        if when is not None and len(frame.colons) <= 2:
            if frame.pipes:
                self._faults.append((frame.at, "'|' beside ':when' is text; put '[a|b]' in brackets of its own"))
            first, last = frame.colons[0], frame.colons[-1]
            before = self._items[frame.start + 1 : first] if first != last else []
            after = self._items[first + 1 if first != last else frame.start + 1 : last]
            return Edit(tuple(before), tuple(after), when)
        if frame.pipes and not frame.colons:
            edges = [frame.start, *frame.pipes, len(self._items)]
            return Alternation(tuple(tuple(self._items[low + 1 : high]) for low, high in pairwise(edges)))
        if when is not None or frame.pipes:
            self._faults.append((frame.at, "is neither '[from:to:when]' nor '[a|b]'"))
        return None

    def _when(self, frame: _Frame) -> str | None:
        """The number behind its last colon."""
        if not frame.colons or frame.colons[-1] != len(self._items) - 2:
            return None
        last = self._items[-1]
        match = _WHEN.fullmatch(last) if isinstance(last, str) else None
        return match and match.group(1)


def _is_half_a_change(frame: _Frame) -> bool:
    """A1111 takes nothing around such brackets as a change."""
    return frame.bracket == "[" and bool(frame.colons or frame.pipes)
