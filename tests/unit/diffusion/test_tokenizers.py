"""Prompts become the same ids as with transformers' CLIPTokenizer, from every layout of files that checkpoints have."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from services.diffusion.models.recipes import MERGES
from services.diffusion.models.tokenizer import END, START, from_folder, shipped, vocabulary

PIECES = st.one_of(
    st.sampled_from(
        ["a", "cat's", "don't", "!", "!!", "42", " ", "\t\n", START, END, "<|ENDOFTEXT|>", "</w>", "猫", "🙂"]
    ),
    st.text(max_size=8),
    st.text(min_size=200, max_size=400),
)
PROMPTS = st.lists(PIECES, max_size=8).map("".join)


def mark(name: str, *, normalized: bool) -> dict[str, object]:
    return {"content": name, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def vocabulary_files(folder: Path) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary(MERGES)))
    (folder / "merges.txt").write_text(MERGES.read_text(encoding="utf-8"), encoding="utf-8")


def as_stable_diffusion_1(folder: Path) -> None:
    vocabulary_files(folder)
    marks = {"bos_token": mark(START, normalized=True), "eos_token": mark(END, normalized=True), "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps({**marks, "unk_token": mark(END, normalized=True)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": END, "model_max_length": 77}))


def as_sdxls_second(folder: Path) -> None:
    vocabulary_files(folder)
    added = {"0": ("!", False), "49406": (START, True), "49407": (END, True)}
    decoder = {key: {**mark(name, normalized=is_so), "special": True} for key, (name, is_so) in added.items()}
    marks = {"bos_token": START, "eos_token": END, "pad_token": "!", "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, **marks}))


def as_transformers_writes_it(folder: Path) -> None:
    merges = [tuple(line.split()) for line in MERGES.read_text(encoding="utf-8").splitlines()[1:]]
    CLIPTokenizer(vocab=vocabulary(MERGES), merges=merges, pad_token="!").save_pretrained(folder)


@pytest.fixture(scope="module", params=[as_stable_diffusion_1, as_sdxls_second, as_transformers_writes_it])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return from_folder(folder), CLIPTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(prompt=PROMPTS)
def test_the_ids_are_transformers(both, prompt):
    ours, theirs = both
    assert ours.ids(prompt) == theirs(prompt, add_special_tokens=False, verbose=False).input_ids


def test_the_marks_are_transformers(both):
    ours, theirs = both
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.pad_token_id, len(ours)) == (theirs.pad_token_id, len(theirs))


@pytest.mark.parametrize("pad_token", ["!", END])
def test_the_shipped_one_is_transformers_too(pad_token):
    merges = [tuple(line.split()) for line in MERGES.read_text(encoding="utf-8").splitlines()[1:]]
    theirs = CLIPTokenizer(vocab=vocabulary(MERGES), merges=merges, pad_token=pad_token)
    for prompt in ("a photo of a cat!", "", "Ünïcödé <|endoftext|> 猫 !!"):
        assert shipped(pad_token).ids(prompt) == theirs(prompt, add_special_tokens=False).input_ids
