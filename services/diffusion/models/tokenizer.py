"""CLIP's tokenizer: a checkpoint's own, or for single files the shipped one. Encodes no prompts.

Built as transformers' CLIPTokenizer builds it, whose import takes longer than torch's.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from services.diffusion.models.entries import CheckpointEntry
from services.diffusion.models.faults import CONTENT_ERRORS, damaged
from services.diffusion.models.recipes import CONFIG_LIMIT_BYTES, MERGES, Config, TextRecipe, read_json
from services.kernel.files import read_limited

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Each takes the longer to add the more there are; models have two, or a few more with textual inversions in them.
ADDED_LIMIT = 1_000
# What a tokenizer is read from.
_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")
# A tokenizer's special tokens and their defaults, in the order in which they are numbered.
_MARKS: Mapping[str, str | None] = {
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "sep_token": None,
    "pad_token": END,
    "cls_token": None,
    "mask_token": None,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClipTokenizer:
    backend: Tokenizer
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    # Of a comma at a word's end; None where the vocabulary has none.
    comma_token_id: int | None = None

    def ids(self, words: str) -> list[int]:
        """Without the marks at both ends; of any length."""
        ids: list[int] = self.backend.encode(words, add_special_tokens=False).ids
        return ids

    def __len__(self) -> int:
        size: int = self.backend.get_vocab_size()
        return size


def load_tokenizer(entry: CheckpointEntry, recipe: TextRecipe) -> ClipTokenizer:
    """UnusableModel or NodeFault where a file is missing or damaged."""
    if entry.recipe.folder is None:
        return shipped(recipe.pad_token)
    with _translate_damage(f"{entry.id}/{recipe.tokenizer}"):
        return from_folder(entry.recipe.folder / recipe.tokenizer)


def digest_of(entry: CheckpointEntry, recipe: TextRecipe) -> str:
    """Equal for checkpoints whose tokenizers are equal, as most are within a family. Raises as load_tokenizer."""
    if entry.recipe.folder is None:
        return recipe.pad_token
    digest = hashlib.sha256()
    folder = entry.recipe.folder / recipe.tokenizer
    with _translate_damage(f"{entry.id}/{recipe.tokenizer}"):
        for name in _FILES:
            if (folder / name).exists():
                content = read_limited(folder / name, CONFIG_LIMIT_BYTES)
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


@contextmanager
def _translate_damage(name: str) -> Iterator[None]:
    try:
        yield
    except CONTENT_ERRORS as error:
        raise damaged(name, error, f"{name} cannot be loaded: a file is missing or damaged") from error


@cache
def shipped(pad_token: str) -> ClipTokenizer:
    """One for all checkpoints of single files; never changed."""
    return _tokenizer(vocabulary(MERGES), _merges(MERGES), [], {**_MARKS, "pad_token": pad_token})


def from_folder(folder: Path) -> ClipTokenizer:
    """From tokenizer.json, or from vocab.json and merges.txt where there is none."""
    files = {
        name: _optional(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map", "tokenizer")
    }
    if whole := files["tokenizer"]:
        model = whole["model"]
        words, merges = (
            model["vocab"],
            [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]],
        )
    else:
        words, merges = read_json(folder / "vocab.json"), _merges(folder / "merges.txt")
    config = files["tokenizer_config"]
    marks = {name: config.get(name, default) for name, default in _MARKS.items()}
    if "added_tokens_decoder" in config:
        added = {int(number): each for number, each in config["added_tokens_decoder"].items()}
    else:
        marks |= {name: each for name, each in files["special_tokens_map"].items() if name in _MARKS}
        added = {each["id"]: each for each in whole.get("added_tokens", ())}
    return _tokenizer(words, merges, [_token(added[number]) for number in sorted(added)], marks)


def _tokenizer(
    words: Mapping[str, int], merges: Sequence[Any], added: Sequence[AddedToken], marks: Mapping[str, Any]
) -> ClipTokenizer:
    tokens = {name: _token(mark) for name, mark in marks.items() if mark is not None}
    unknown = tokens["unk_token"].content
    # BPE itself raises a plain Exception, for this and for an unknown token that is not there.
    if not all(map(words.__contains__, chain([unknown], chain.from_iterable(merges), map("".join, merges)))):
        raise ValueError("a merge or the unknown token uses a token that is not in the vocabulary")
    if len(added) > ADDED_LIMIT:
        raise ValueError(f"{len(added)} tokens are added to the vocabulary; the limit is {ADDED_LIMIT}")
    backend = Tokenizer(
        BPE(dict(words), list(merges), continuing_subword_prefix="", end_of_word_suffix=_WORD_END, unk_token=unknown)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True), ByteLevel(add_prefix_space=False)]
    )
    known = {each.content for each in added}
    more = {each.content: each for each in tokens.values() if each.content not in known}
    for each in (*added, *more.values()):
        backend.add_tokens([each])
    numbers = backend.get_vocab(with_added_tokens=True)
    return ClipTokenizer(
        backend=backend,
        bos_token_id=numbers[tokens["bos_token"].content],
        eos_token_id=numbers[tokens["eos_token"].content],
        pad_token_id=numbers[tokens["pad_token"].content],
        comma_token_id=numbers.get(f",{_WORD_END}"),
    )


def _token(content: Any) -> AddedToken:
    """From its text alone, or from its JSON object."""
    if isinstance(content, str):
        return AddedToken(content, special=True, normalized=False)
    options = {name: content[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in content}
    return AddedToken(content["content"], **{"special": True, **options})


def _optional(file: Path) -> Config:
    return read_json(file) if file.exists() else {}


def _merges(file: Path) -> list[tuple[str, str]]:
    """Without the first line, the version."""
    pairs = (line.split() for line in read_limited(file, CONFIG_LIMIT_BYTES).decode().splitlines()[1:])
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def vocabulary(merges: Path) -> dict[str, int]:
    """As CLIP numbers its tokens: every byte, every byte at a word's end, every merge, the two marks."""
    letters = _letters()
    joined = ["".join(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()[1:]]
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *joined, START, END]
    return {token: number for number, token in enumerate(tokens)}


def _letters() -> list[str]:
    """The letters that stand for bytes: the printable ones first, then those that stand for the others."""
    letters = sorted(ByteLevel.alphabet())
    return [letter for letter in letters if ord(letter) < 256] + [letter for letter in letters if ord(letter) >= 256]
