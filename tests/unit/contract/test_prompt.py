"""What a prompt may fill, and what it names."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fanlight.contract.limits import PART_TOKENS, PROMPT_CHARACTERS_LIMIT, PROMPT_PARTS_LIMIT
from fanlight.contract.prompt import (
    PromptSegment,
    check_prompt,
    loras_in,
    most_parts,
    parse_prompt,
    read_weights,
    with_loras_renamed,
    words_in,
)
from fanlight.errors import InvalidField, TooLarge
from services.diffusion.models.tokenizer import shipped


def parts_of(text: str) -> int:
    return most_parts(read_weights(parse_prompt(text, "prompt").text))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", 1),
        ("a" * 75, 1),
        ("a" * 76, 2),
        ("a " * 75, 1),
        ("a BREAK b", 2),
        ("BREAK", 2),
        ("\u676f" * 25, 1),
        ("\u676f" * 26, 2),
        # Longer in lower case, and longer in NFC: two bytes of `\u0130` are three, three of `\u0958` are six.
        ("\u0130" * 25, 1),
        ("\u0130" * 26, 2),
        ("\u0958" * 12, 1),
        ("\u0958" * 13, 2),
        # A tag is no text.
        (f"<lora:{'x' * 100}:1>", 1),
        ("(a:1.1)" * 76, 2),
    ],
)
def test_a_part_is_75_bytes_of_text_at_most(text, parts):
    assert parts_of(text) == parts


def test_any_ascii_prompt_without_breaks_fits():
    check_prompt("a" * PROMPT_CHARACTERS_LIMIT, "prompt")
    assert PROMPT_PARTS_LIMIT * PART_TOKENS >= PROMPT_CHARACTERS_LIMIT


@settings(deadline=None)
@given(st.text(max_size=12))
@example("\u0130\u0958\u00c5 \u212b \u0301a\u0301")
@example("0\x1f")
def test_no_text_has_more_tokens_than_bytes(text):
    text *= PART_TOKENS
    assert len(shipped("<|endoftext|>").ids(text)) <= most_parts(((PromptSegment(text, 1.0),),)) * PART_TOKENS


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("a" * 10_001, TooLarge, "10001 characters; at most 10000"),
        ("\u676f" * 9_000, InvalidField, "may fill 360 parts of 75 tokens; at most 150"),
        ("BREAK " * 150, InvalidField, "151 parts"),
        ("(a", InvalidField, "never closed"),
    ],
)
def test_what_the_encoder_cannot_take_is_refused(text, error, says):
    with pytest.raises(error, match=says) as caught:
        check_prompt(text, "negative_prompt")

    assert caught.value.field == "negative_prompt"


@pytest.mark.parametrize(
    ("text", "loras"),
    [
        ("a <lora:one:1> b <lyco:two>", ["one", "two"]),
        (r"\<lora:one:1>", []),
        (r"\\<lora:one:1>", ["one"]),
        ("<lora: one :1:0.5>", ["one"]),
        ("1 < 2", []),
    ],
)
def test_loras_are_distinguished_from_similar_text(text, loras):
    assert loras_in(text) == loras


@pytest.mark.parametrize(
    ("text", "renamed"),
    [
        ("a <lora:one:0.5>, b", "a <lora:ONE:0.5>, b"),
        ("<lyco: two :1:0.5><lora:three>", "<lyco:TWO:1:0.5><lora:THREE>"),
        (r"\<lora:one:1> (b:1.2)", r"\<lora:one:1> (b:1.2)"),
    ],
)
def test_loras_are_renamed_where_they_are(text, renamed):
    assert with_loras_renamed(text, str.upper) == renamed


def test_renaming_keeps_the_prompt_within_its_limit():
    prompt = "<lora:a:1>".ljust(10_000, "b")
    assert len(with_loras_renamed(prompt, lambda name: "c")) == 10_000
    with pytest.raises(
        InvalidField, match="10003 characters with its LoRAs named by their ids; at most 10000"
    ) as caught:
        with_loras_renamed(prompt, lambda name: "long")

    assert caught.value.field == "prompt"


@pytest.mark.parametrize("lora_id", ["a:b", "a>b", "a<b", ""])
def test_an_id_that_no_tag_can_hold_is_refused(lora_id):
    with pytest.raises(InvalidField, match="cannot stand in a tag") as caught:
        with_loras_renamed("a <lora:one:0.5>", lambda name: lora_id)

    assert caught.value.field == "prompt"


def test_a_prompt_without_its_loras_keeps_its_words():
    text = "a <lora:one:0.5>, b <lora:two>"
    assert parse_prompt(text, "prompt").text == "a , b "
    assert parse_prompt(" a ", "prompt").text == " a "


def test_words_are_whole():
    names = ["mint", "pepper", "bad-hands", "bad"]
    assert words_in("Mint, peppermint, bad-hands!", names) == ["mint", "bad-hands", "bad"]


def test_loras_are_taken_out_of_changes_and_composed_prompts():
    text = "a [<lora:one:0.5>cat:<lora:two>dog:3] AND b<lora:three>:0.5"
    parsed = parse_prompt(text, "prompt")
    assert [tag.name for tag in parsed.loras] == ["one", "two", "three"]
    assert parsed.texts(10) == ["a cat", "a dog", " b"]
    assert [each.weight for each in parsed.prompts] == [1.0, 0.5]
    assert with_loras_renamed(text, str.upper).count("<lora:TWO>") == 1
