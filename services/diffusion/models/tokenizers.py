"""CLIP's tokenizer: a checkpoint's own, or for single files the one that ships here. Encodes no prompts."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from services.diffusion.models.entries import CheckpointEntry
from services.diffusion.models.recipes import MERGES, TextRecipe, UnfitFolder, read_json
from services.kernel.errors import NodeFault
from services.kernel.logs import get_logger

log = get_logger()

START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77
_WORD_END = "</w>"


def load_tokenizer(entry: CheckpointEntry, recipe: TextRecipe) -> Any:
    """NodeFault where a file is missing or damaged."""
    if entry.recipe.folder is None:
        return shipped(recipe.pad_token)
    folder = entry.recipe.folder / recipe.tokenizer
    try:
        for file in folder.glob("*.json"):
            read_json(file)  # of a broken one the tokenizers library makes a bare Exception
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (UnfitFolder, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("load_failed", model=entry.id, part=recipe.tokenizer, cause=repr(error))
        raise NodeFault(f"{entry.id}/{recipe.tokenizer} cannot be loaded: a file is missing or damaged") from error


def digest_of(entry: CheckpointEntry, recipe: TextRecipe) -> str:
    """The same for checkpoints whose tokenizers are the same; a family mostly has one."""
    if entry.recipe.folder is None:
        return recipe.pad_token
    digest = hashlib.sha256()
    folder = entry.recipe.folder / recipe.tokenizer
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def shipped(pad_token: str) -> Any:
    """The same for all checkpoints; changed by none."""
    merges = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    return CLIPTokenizer(
        vocab=vocabulary(MERGES),
        merges=[tuple(line.split()) for line in merges],
        model_max_length=POSITIONS,
        pad_token=pad_token,
    )


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
