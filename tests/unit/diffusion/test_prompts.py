"""Prompts are encoded whole, however long."""

from dataclasses import replace

import pytest
import torch
from transformers import CLIPTokenizer

from fanlight.contract.limits import PROMPT_CHARACTERS_LIMIT, PROMPT_PARTS_LIMIT
from fanlight.contract.prompt import FORGIVING, PLAIN, most_parts, read_weights
from fanlight.errors import InvalidField
from services.diffusion.engine import conditioning
from services.diffusion.engine.conditioning import ConditioningCache, encode_one, encode_pair
from services.diffusion.models.tokenizer import shipped
from services.diffusion.prompt import PromptChunk, to_chunks
from services.kernel.blobs import ByteLru


@pytest.fixture(scope="module")
def checkpoint(manager, catalog):
    return manager.checkpoint(catalog.default())


@pytest.mark.parametrize("prompt", ["", "a cat", "x" * 75, "Ünïcödé, 猫"])
def test_a_short_prompt_is_encoded_as_the_tokenizer_pads_it(prompt, checkpoint):
    [text] = checkpoint.texts
    plain = CLIPTokenizer.from_pretrained(checkpoint.entry.path / "tokenizer")
    ids = plain(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    assert torch.equal(encode_one(checkpoint, prompt).embeds, text.encoder(ids).last_hidden_state)


def test_the_end_of_a_long_prompt_counts(checkpoint):
    one, other = (encode_one(checkpoint, "x" * 100 + end).embeds for end in ("a", "b"))
    assert one.shape == (1, 154, 16)
    assert torch.equal(one[:, :77], other[:, :77])
    assert not torch.equal(one[:, 77:], other[:, 77:])


def test_a_short_negative_prompt_is_filled_up_to_a_long_prompts_length(checkpoint):
    positive, negative = encode_pair(checkpoint, "x" * 100, "bad")
    assert positive.embeds.shape == negative.embeds.shape
    assert torch.equal(negative.embeds[:, 77:], encode_one(checkpoint, "").embeds)


def test_a_prompt_of_too_many_tokens_is_refused_and_not_cut(checkpoint):
    with pytest.raises(InvalidField) as caught:
        encode_pair(checkpoint, "a cat", "x" * (75 * PROMPT_PARTS_LIMIT + 1))
    assert caught.value.field == "negative_prompt"


def test_weights_where_states_add_up_to_nothing_leave_them_sound(checkpoint):
    [text] = checkpoint.texts
    text.encoder.final_layer_norm.bias.data.zero_()
    try:
        embeds = encode_one(checkpoint, "a (cat:1.5)").embeds
    finally:
        text.encoder.final_layer_norm.bias.data.fill_(0.1)
    assert 0.1 < float(embeds.abs().mean()) < 10


def test_weights_change_states_as_a1111_does(checkpoint):
    [text] = checkpoint.texts
    plain = encode_one(checkpoint, "a cat").embeds[0]
    weighted = encode_one(checkpoint, "a (cat:1.5)").embeds[0]
    column = torch.ones(77, 1)
    column[1 + len(text.tokenizer.ids("a")) :][: len("cat")] = 1.5
    scaled = plain * column
    assert torch.allclose(weighted, scaled * (plain.mean() / scaled.mean()), atol=1e-6)


def test_words_without_weights_are_tokens_as_usual(checkpoint):
    assert (
        torch.equal(encode_one(checkpoint, r"a \(cat\)").embeds, encode_one(checkpoint, "a (cat:1.0)").embeds) is False
    )
    assert torch.equal(encode_one(checkpoint, "a (cat:1.0)").embeds, encode_one(checkpoint, "a cat").embeds)


def test_break_fills_up_a_chunk(checkpoint):
    embeds = encode_one(checkpoint, "a cat BREAK a dog").embeds
    assert torch.equal(embeds, torch.cat([encode_one(checkpoint, each).embeds for each in ("a cat", "a dog")], dim=1))


def test_a_prompt_is_encoded_once_for_all_who_say_the_same(checkpoint, asked):
    prompts = ConditioningCache()
    first = prompts.get(asked(seed=1), checkpoint)
    assert prompts.get(asked(seed=2, steps=3), checkpoint) is first
    assert prompts.get(asked(clip_skip=2), checkpoint) is not first
    assert prompts.get(asked(negative_prompt="ugly"), checkpoint) is not first


def test_the_cache_evicts_the_least_recently_used_beyond_its_bytes():
    cache = ByteLru(limit_bytes=10, size_of=len)
    for word in ("aaaa", "bbbb", "cccc"):
        cache.put(word, word)
    assert cache.size_bytes == 8
    assert cache.get("aaaa") is None
    assert cache.get("bbbb") == "bbbb"
    cache.put("far too long", "x" * 11)
    assert cache.get("far too long") is None
    assert cache.size_bytes <= 10


def test_an_evicted_prompt_is_encoded_again(checkpoint, asked, monkeypatch):
    monkeypatch.setattr(conditioning, "CACHE_LIMIT_BYTES", 1)
    prompts = ConditioningCache()
    first = prompts.get(asked(seed=1), checkpoint)
    again = prompts.get(asked(seed=1), checkpoint)
    assert again is not first
    assert torch.equal(again.prompts[0][0][0][1].embeds, first.prompts[0][0][0][1].embeds)


def sizes_of(chunks: list[PromptChunk]) -> list[int]:
    return [len(chunk.ids) for chunk in chunks]


def chunked(checkpoint, text: str) -> list[PromptChunk]:
    part = replace(checkpoint.texts[0], tokenizer=shipped("<|endoftext|>"), added={"big": tuple(range(30))})
    return to_chunks(part, read_weights(text, FORGIVING), "prompt")


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        # By A1111's modules/sd_hijack_clip.py with its default, `comma_padding_backtrack` 20; each word is a token.
        ("cat " * 80, [75, 5]),
        ("cat " * 60 + ", " + "dog " * 20, [61, 20]),
        ("cat " * 54 + ", " + "dog " * 30, [75, 10]),
        ("cat " * 55 + ", " + "dog " * 30, [56, 30]),
        ("cat " * 74 + ", " + "dog " * 3, [75, 3]),
        ("cat " * 75 + ", " + "dog " * 3, [75, 4]),
        ("cat " * 60 + ", " + "cat " * 9 + ", " + "dog " * 20, [71, 20]),
        ("cat " * 60 + ", " + "dog " * 15, [75 + 1 - 15, 15]),
        ("cat " * 60 + ", " + "dog " * 5 + "big", [66, 30]),
        ("cat " * 60 + ", " + "dog " * 14 + "big", [61, 44]),
        ("cat " * 5 + "BREAK " + "dog " * 5, [5, 5]),
        ("cat BREAK", [1]),
        ("cat BREAK\n", [1]),
        ("cat BREAK BREAK", [1, 0]),
        ("BREAK cat", [0, 1]),
        ("BREAK", [0]),
        ("", [0]),
    ],
)
def test_a_prompt_is_cut_into_chunks_as_a1111_cuts_it(text, sizes, checkpoint):
    assert sizes_of(chunked(checkpoint, text)) == sizes


def test_what_the_contract_takes_fits_however_its_commas_stand(checkpoint):
    """Each digit is a token. With words moved behind every comma they would fill 163 parts."""
    text = ("1" * 60 + ",") * 163
    assert len(text) <= PROMPT_CHARACTERS_LIMIT
    assert most_parts(read_weights(text)) <= PROMPT_PARTS_LIMIT
    assert sizes_of(chunked(checkpoint, text)) == [75] * 132 + [43]
    assert sizes_of(chunked(checkpoint, text[: 61 * 149])) == [61] * 149


def test_weights_without_their_norm_leave_the_mean(checkpoint, asked):
    def embeds(**fields) -> torch.Tensor:
        [(((_, conditioning),), _)] = ConditioningCache().get(asked(**fields), checkpoint).prompts
        return conditioning.embeds[0]

    plain = embeds(prompt="a cat")
    column = torch.ones(77, 1)
    column[1 + len(checkpoint.texts[0].tokenizer.ids("a")) :][: len("cat")] = 1.5
    assert torch.allclose(embeds(prompt="a (cat:1.5)", emphasis="no_norm"), plain * column, atol=1e-6)
    assert torch.equal(embeds(prompt="a (cat:1.5)", emphasis="ignore"), plain)
    assert torch.equal(embeds(prompt="a (cat)", emphasis="none"), embeds(prompt=r"a \(cat\)"))
    assert torch.equal(embeds(prompt="a (cat)", prompt_syntax=PLAIN), embeds(prompt=r"a \(cat\)"))


def test_clip_skip_counts_for_both_prompts(checkpoint, asked):
    conditioning = ConditioningCache().get(asked(negative_prompt="a cat", clip_skip=2), checkpoint).at(1)
    assert torch.equal(conditioning.prompts[0][0].embeds, conditioning.unconditional.embeds)
    assert not torch.equal(conditioning.unconditional.embeds, encode_one(checkpoint, "a cat").embeds)
