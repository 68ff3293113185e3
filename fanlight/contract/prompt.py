"""Parses A1111's prompt syntax. No tokens, no torch; a syntax error names its place in the prompt.

`(more)` and `[less]`, `(so much:1.3)`, `\\(` for a bracket itself, `BREAK` for a new part, `<lora:name:weight>`,
`[from:to:when]` and `[a|b]` for a prompt that changes from step to step, `AND` between prompts that are composed.
"""

import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from fanlight.contract.limits import (
    DEFAULT_STEPS,
    LORAS_LIMIT,
    PART_TOKENS,
    PROMPT_AND_LIMIT,
    PROMPT_CHANGES_DEPTH_LIMIT,
    PROMPT_CHANGES_LIMIT,
    PROMPT_CHARACTERS_LIMIT,
    PROMPT_DEPTH_LIMIT,
    PROMPT_PARTS_LIMIT,
    PROMPT_TEXTS_CHARACTERS_LIMIT,
    PROMPT_TEXTS_LIMIT,
    PROMPT_WEIGHT_LIMIT,
    STEPS_LIMIT,
    check_characters,
    format_number,
)
from fanlight.contract.lora_tag import BadLoraTag, read_lora_tag
from fanlight.contract.prompt_schedule import PromptTemplate, parse_template
from fanlight.contract.prompt_weights import (
    EMPHASES,
    FORGIVING,
    IGNORE,
    LESS,
    MORE,
    NO_NORM,
    NONE,
    ORIGINAL,
    PLAIN,
    STRICT,
    SYNTAXES,
    PromptParts,
    PromptSegment,
    read_weights,
    to_weight,
)
from fanlight.errors import InvalidField

__all__ = [
    "EMPHASES",
    "FORGIVING",
    "IGNORE",
    "LESS",
    "MORE",
    "NONE",
    "NO_NORM",
    "ORIGINAL",
    "PLAIN",
    "STRICT",
    "SYNTAXES",
    "ComposedPrompt",
    "LoraTag",
    "ParsedPrompt",
    "PromptParts",
    "PromptSegment",
    "PromptSize",
    "check_prompt",
    "loras_in",
    "most_parts",
    "parse_prompt",
    "read_weights",
    "with_loras_renamed",
    "words_in",
]

_TOKEN = re.compile(
    r"""
    \\[()\[\]\\<>:|]
    | (?P<tag><(?P<kind>lora|lyco|hypernet):(?P<inner>[^<>]*)(?P<end>>?))
    | (?P<and>\bAND\b)
    | (?P<open>[(\[])
    | (?P<weight>:\s*(?P<number>[-+.,\d][^\s()\[\]\\:]*|(?i:nan|inf|infinity)|)\s*\))
    | (?P<close>[)\]])
    | [^\\()\[\]:<A]+|.
    """,
    re.VERBOSE | re.DOTALL,
)
_AND = re.compile(r"\bAND\b")
_AND_WEIGHT = re.compile(r":\s*([-+]?(?:\d+\.?\d*|\.\d+))\Z")
# The weights that A1111 reads.
_WEIGHT = re.compile(r"[-+]?[.\d]+")
_OPENING = {")": "(", "]": "["}
_WORD = re.compile(r"\w+")
# Unicode's spaces, as in CLIP's tokenizer; Python also counts four control characters.
_SPACES = re.compile(r"[^\S\x1c-\x1f]+")


@dataclass(frozen=True, slots=True)
class LoraTag:
    name: str
    unet_weight: float
    text_weight: float
    # Its start and end in the prompt, counted from 0.
    at: int
    end: int


@dataclass(frozen=True, slots=True)
class ComposedPrompt:
    """One of the prompts between ANDs."""

    template: PromptTemplate
    weight: float = 1.0

    def schedule(self, steps: int) -> tuple[tuple[int, str], ...]:
        """Each text with the last step that has it, as in PromptTemplate; equal ones in turn are one."""
        turns: list[tuple[int, str]] = []
        for end, text in self.template.schedule(steps):
            if turns and turns[-1][1] == text:
                turns.pop()
            turns.append((end, text))
        return tuple(turns)


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    # One, or with AND several.
    prompts: tuple[ComposedPrompt, ...]
    loras: tuple[LoraTag, ...]
    # The prompt without its tags.
    text: str
    # What was read otherwise than it may have been meant, in sentences without the field.
    warnings: tuple[str, ...] = ()

    @property
    def has_changes(self) -> bool:
        """Whether its text depends on the step."""
        return any(prompt.template.changes for prompt in self.prompts)

    def texts(self, steps: int) -> list[str]:
        """All that it says in so many steps, each once."""
        return list(dict.fromkeys(text for prompt in self.prompts for _, text in prompt.schedule(steps)))

    def unreached(self, steps: int, count: int) -> int:
        """The first step with another text that is not among the first `count` of `steps`; 0 if all are."""
        begins = [end + 1 for prompt in self.prompts for end, _ in prompt.schedule(steps)[:-1]]
        return min((begin for begin in begins if begin > count), default=0)

    def outside(self, steps: int) -> list[str]:
        """When changes should come that so many steps never reach, as it is written."""
        return [when for prompt in self.prompts for when in prompt.template.outside(steps)]


@dataclass(frozen=True, slots=True)
class PromptSize:
    """How many texts a prompt has in turn, and the most parts of 75 tokens that one of them may fill."""

    texts: int
    parts: int


# A prompt is parsed several times between a request and its tasks; a cached one may take a megabyte.
PARSED_PROMPTS_CACHED = 16


@lru_cache(maxsize=PARSED_PROMPTS_CACHED)
def parse_prompt(text: str, field: str, syntax: str = STRICT) -> ParsedPrompt:
    """InvalidField about the field, which names the character, counted from 1.

    FORGIVING reads nearly all mistakes as A1111 does, with a warning; PLAIN knows no syntax.
    """
    if syntax == PLAIN:
        return ParsedPrompt((ComposedPrompt(PromptTemplate((text,))),), (), text)
    return _Parser(text, field, is_forgiving=syntax == FORGIVING).parse()


def check_prompt(
    text: str, field: str, syntax: str = STRICT, *, emphasis: str = ORIGINAL, steps: int = DEFAULT_STEPS
) -> PromptSize:
    """TooLarge for more than 10,000 characters; InvalidField for a mistake, too many parts or texts in turn."""
    check_characters(text, PROMPT_CHARACTERS_LIMIT, field=field)
    texts = parse_prompt(text, field, syntax).texts(max(1, min(steps, STEPS_LIMIT)))
    if len(texts) > PROMPT_TEXTS_LIMIT:
        raise InvalidField(f"changes into {len(texts)} texts; at most {PROMPT_TEXTS_LIMIT} are taken", field=field)
    if (characters := sum(map(len, texts))) > PROMPT_TEXTS_CHARACTERS_LIMIT:
        raise InvalidField(
            f"changes into {len(texts)} texts of {characters} characters; at most {PROMPT_TEXTS_CHARACTERS_LIMIT} are"
            " taken",
            field=field,
        )
    parts = max(most_parts(read_weights(each, syntax, emphasis)) for each in texts)
    if parts > PROMPT_PARTS_LIMIT:
        raise InvalidField(
            f"may fill {parts} parts of {PART_TOKENS} tokens; at most {PROMPT_PARTS_LIMIT} are taken: shorten it, "
            "or use fewer BREAKs",
            field=field,
        )
    return PromptSize(len(texts), parts)


def most_parts(parts: PromptParts) -> int:
    """An upper bound of the parts of 75 tokens that a text fills, whatever the vocabulary of the CLIP encoder.

    A byte-level token has at least one byte of the text as CLIP normalizes it, and each BREAK begins a part. Embeddings
    may add to it: only the worker knows how many vectors one has.
    """
    return sum(max(1, math.ceil(_normalized_bytes(part) / PART_TOKENS)) for part in parts)


def _normalized_bytes(part: tuple[PromptSegment, ...]) -> int:
    """Of the text in UTF-8, without spaces: as CLIP's tokenizer normalizes it, NFC and lower case."""
    texts = (segment.text if segment.text.isascii() else _normalized(segment.text) for segment in part)
    return sum(len(_SPACES.sub("", text).encode()) for text in texts)


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


def loras_in(prompt: str, syntax: str = STRICT) -> list[str]:
    """The LoRAs that a prompt names, in order. InvalidField, field `prompt`, for a prompt that cannot be parsed."""
    return [tag.name for tag in parse_prompt(prompt, "prompt", syntax).loras]


def with_loras_renamed(prompt: str, rename: Callable[[str], str], syntax: str = STRICT) -> str:
    """The prompt with each LoRA renamed by `rename`. InvalidField for a prompt that cannot be parsed.

    Also for a new name that a tag cannot hold, and for a prompt that becomes too long.
    """
    pieces, end = [], 0
    for tag in parse_prompt(prompt, "prompt", syntax).loras:
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


def words_in(text: str, names: Iterable[str]) -> list[str]:
    """The names that occur in the text as whole words, in any case, as embeddings do in prompts."""
    words = frozenset(_WORD.findall(text.lower()))
    perhaps = (name for name in names if words.issuperset(_WORD.findall(name.lower())))
    return [name for name in perhaps if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)]


class _Untagged:
    """A prompt without its tags, and where each of its characters stands in the prompt."""

    def __init__(self, prompt: str, tags: list[tuple[int, int]]) -> None:
        """`tags`: starts and ends, in order."""
        pieces, end, self._lengths, self._shifts = [], 0, [0], [0]
        for at, tag_end in tags:
            pieces.append(prompt[end:at])
            self._lengths.append(self._lengths[-1] + at - end)
            self._shifts.append(tag_end - self._lengths[-1])
            end = tag_end
        self.text = "".join([*pieces, prompt[end:]])

    def place_of(self, at: int) -> int:
        return at + self._shifts[bisect_right(self._lengths, at) - 1]


class _Parser:
    """Looks for mistakes in the whole prompt, takes its tags out, then reads what is left in pieces between ANDs."""

    def __init__(self, text: str, field: str, *, is_forgiving: bool) -> None:
        self._text = text
        self._field = field
        self._is_forgiving = is_forgiving
        # Where brackets that are not closed yet stand, by kind.
        self._open: dict[str, list[int]] = {"(": [], "[": []}
        self._loras: list[LoraTag] = []
        # Starts and ends of all tags.
        self._tags: list[tuple[int, int]] = []
        self._warnings: list[str] = []
        self._depth = 0

    def parse(self) -> ParsedPrompt:
        self._scan()
        untagged = _Untagged(self._text, self._tags)
        if self._tags and not self._is_forgiving:
            # What stood around a tag may read otherwise without it.
            _Parser(untagged.text, self._field, is_forgiving=False)._scan()
        prompts = tuple(self._prompts(untagged))
        # Those of changes are none of a text's.
        if self._depth - max(prompt.template.depth for prompt in prompts) > PROMPT_DEPTH_LIMIT:
            self._warnings.append(f"brackets within {PROMPT_DEPTH_LIMIT} others do not count")
        return ParsedPrompt(prompts, tuple(self._loras), untagged.text, tuple(self._warnings))

    def _scan(self) -> None:
        for match in _TOKEN.finditer(self._text):
            self._take(match)
        for at in sorted([*self._open["("], *self._open["["]], reverse=not self._is_forgiving):
            bracket = self._text[at]
            self._mistake(
                at,
                f"{bracket!r} is never closed; for the bracket itself write '\\{bracket}'",
                f"{bracket!r} is never closed and counts to the end",
            )

    def _take(self, match: re.Match[str]) -> None:
        at = match.start()
        if match["tag"]:
            self._take_tag(match)
        elif match["and"]:
            self._take_and(at)
        elif match["open"]:
            self._push(match["open"], at)
        elif match["weight"] is not None:
            self._weighted(match)
        elif match["close"]:
            self._close(match["close"], at)

    def _take_and(self, at: int) -> None:
        if self._field == "negative_prompt":
            self._mistake(at, "'AND' composes prompts, not negative ones; write it in lower case", "'AND' is text here")
        elif self._is_open():
            self._mistake(
                at, "'AND' stands in brackets; it composes whole prompts", "'AND' ends all brackets around it"
            )

    def _is_open(self) -> bool:
        return bool(self._open["("] or self._open["["])

    def _push(self, bracket: str, at: int) -> None:
        depth = len(self._open["("]) + len(self._open["["])
        if depth == PROMPT_DEPTH_LIMIT and not self._is_forgiving:
            raise self._error(at, f"is bracket {PROMPT_DEPTH_LIMIT + 1} within others; at most {PROMPT_DEPTH_LIMIT}")
        self._open[bracket].append(at)
        self._depth = max(self._depth, depth + 1)

    def _weighted(self, match: re.Match[str]) -> None:
        """A colon, what may be a number, and a closing bracket."""
        if self._is_within("("):
            self._check_weight(match["number"], match.start("number"))
        self._close(")", match.end() - 1)

    def _is_within(self, bracket: str) -> bool:
        """Whether a closing one has its partner: in strict syntax, without another bracket between them."""
        own, other = self._open[bracket], self._open["[" if bracket == "(" else "("]
        return bool(own) and (self._is_forgiving or not other or other[-1] < own[-1])

    def _check_weight(self, text: str, at: int) -> None:
        weight, shown = to_weight(text), repr(text.strip()[:40])
        limit = PROMPT_WEIGHT_LIMIT
        if weight is None:
            self._mistake(at, f"{shown} is not a weight such as 1.2", f"{shown} is not a weight and is taken as text")
        elif not math.isfinite(weight) or abs(weight) > limit:
            self._mistake(
                at,
                f"the weight is {format_number(weight)}; must be {-limit:g} to {limit:g}",
                f"the weight {shown} is beyond {-limit:g} to {limit:g}",
            )
        elif not _WEIGHT.fullmatch(text):
            self._mistake(at, f"{shown} is not a weight such as 1.2", f"{shown} is not a weight and is taken as text")

    def _close(self, bracket: str, at: int) -> None:
        opening = _OPENING[bracket]
        if self._is_within(opening):
            self._open[opening].pop()
            return
        self._mistake(
            at,
            f"{bracket!r} closes nothing; for the bracket itself write '\\{bracket}'",
            f"{bracket!r} closes nothing and is taken as text",
        )

    def _take_tag(self, match: re.Match[str]) -> None:
        at = match.start()
        try:
            tag = self._lora(match)
        except InvalidField as error:
            if not self._is_forgiving:
                raise
            is_tag = bool(match["end"])
            self._warnings.append(f"{error.message}; it is {'left out' if is_tag else 'taken as text'}")
            if is_tag:
                self._tags.append((at, match.end()))
            return
        if len(self._loras) == LORAS_LIMIT:
            raise self._error(at, f"is one LoRA too many; at most {LORAS_LIMIT}")
        self._loras.append(tag)
        self._tags.append((at, match.end()))

    def _lora(self, match: re.Match[str]) -> LoraTag:
        at = match.start()
        if not match["end"]:
            raise self._error(at, f"'<{match['kind']}:' is never closed by a '>'")
        if match["kind"] == "hypernet":
            raise self._error(at, "hypernetworks are not offered")
        try:
            read = read_lora_tag(match["inner"])
        except BadLoraTag as error:
            raise self._error(at, str(error)) from error
        for each in read.unused:
            self._mistake(at, f"{each!r} in a LoRA's tag is not offered", f"{each!r} in a LoRA's tag was not used")
        return LoraTag(read.name, read.unet_weight, read.text_weight, at, match.end())

    def _prompts(self, untagged: _Untagged) -> Iterator[ComposedPrompt]:
        ands = [] if self._field == "negative_prompt" else [each.span() for each in _AND.finditer(untagged.text)]
        if len(ands) >= PROMPT_AND_LIMIT:
            raise InvalidField(
                f"composes {len(ands) + 1} prompts with AND; at most {PROMPT_AND_LIMIT} are taken: each costs an"
                " evaluation of the model in every step",
                field=self._field,
            )
        starts, ends = [0, *(end for _, end in ands)], [*(start for start, _ in ands), len(untagged.text)]
        left = PROMPT_CHANGES_LIMIT
        for start, end in zip(starts, ends, strict=True):
            text, weight = untagged.text[start:end], 1.0
            if ands:
                text, weight = self._and_weight(text, untagged.place_of(start))
            template = parse_template(text)
            left -= template.changes
            self._check_changes(template, left)
            for at, message in template.faults:
                self._mistake(untagged.place_of(start + at), message, f"{message}, and is taken as text")
            yield ComposedPrompt(template, weight)

    def _and_weight(self, text: str, at: int) -> tuple[str, float]:
        text = text.rstrip()
        if not text.strip():
            self._mistake(at, "'AND' composes an empty prompt", "'AND' composes an empty prompt")
        match = _AND_WEIGHT.search(text)
        if match is None:
            return text, 1.0
        weight, limit = float(match.group(1)), PROMPT_WEIGHT_LIMIT
        if abs(weight) > limit:
            raise self._error(at, f"the prompt's weight is {format_number(weight)}; must be {-limit:g} to {limit:g}")
        return text[: match.start()].rstrip(), weight

    def _check_changes(self, template: PromptTemplate, left: int) -> None:
        if left < 0:
            raise InvalidField(
                f"has more than {PROMPT_CHANGES_LIMIT} of '[from:to:when]' and '[a|b]'", field=self._field
            )
        if template.depth > PROMPT_CHANGES_DEPTH_LIMIT:
            raise InvalidField(
                f"has {template.depth} of '[from:to:when]' and '[a|b]' in one another; at most"
                f" {PROMPT_CHANGES_DEPTH_LIMIT}",
                field=self._field,
            )

    def _mistake(self, at: int, message: str, warning: str) -> None:
        """Refused, or in forgiving syntax warned of, each sentence once for its place."""
        if not self._is_forgiving:
            raise self._error(at, message)
        self._warnings.append(f"character {at + 1}: {warning}")

    def _error(self, at: int, message: str) -> InvalidField:
        return InvalidField(f"character {at + 1}: {message}", field=self._field)
