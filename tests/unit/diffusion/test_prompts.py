"""Prompts are encoded whole, however long."""

import pytest
import torch

from services.diffusion.prompt.encode import encode_one, encode_pair
from services.kernel.errors import InvalidField


@pytest.fixture(scope="module")
def checkpoint(library, catalogue):
    return library.checkpoint(catalogue.default())


@pytest.mark.parametrize("prompt", ["", "a cat", "x" * 75, "Ünïcödé, 猫"])
def test_a_short_prompt_is_encoded_as_the_tokenizer_pads_it(prompt, checkpoint):
    [text] = checkpoint.texts
    ids = text.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    assert torch.equal(encode_one(checkpoint, prompt).words, text.encoder(ids)[0])


def test_the_end_of_a_long_prompt_counts(checkpoint):
    one, other = (encode_one(checkpoint, "x" * 100 + end).words for end in ("a", "b"))
    assert one.shape == (1, 154, 16)
    assert torch.equal(one[:, :77], other[:, :77])
    assert not torch.equal(one[:, 77:], other[:, 77:])


def test_a_short_negative_prompt_is_filled_up_to_a_long_prompts_length(checkpoint):
    wanted, unwanted = encode_pair(checkpoint, "x" * 100, "bad")
    assert wanted.words.shape == unwanted.words.shape
    assert torch.equal(unwanted.words[:, 77:], encode_one(checkpoint, "").words)


def test_a_prompt_of_too_many_tokens_is_refused_and_not_cut(checkpoint):
    with pytest.raises(InvalidField) as caught:
        encode_pair(checkpoint, "a cat", "x" * 1201)
    assert caught.value.field == "negative_prompt"
