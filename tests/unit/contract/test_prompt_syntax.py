"""A1111's prompt syntax is read as A1111 reads it; what is wrong is pointed at, and nothing is dropped."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanlight.contract.prompt import LESS, MORE, LoraTag, parse_prompt, read_weights
from fanlight.errors import InvalidField


def _read(text):
    """By part, each segment's text and weight, rounded."""
    parts = read_weights(parse_prompt(text, "prompt").text)
    return [[(segment.text, round(segment.weight, 4)) for segment in part] for part in parts]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", []),
        ("a (big) cat", [("a ", 1.0), ("big", MORE), (" cat", 1.0)]),
        ("a ((big)) cat", [("a ", 1.0), ("big", MORE**2), (" cat", 1.0)]),
        ("a [small] cat", [("a ", 1.0), ("small", LESS), (" cat", 1.0)]),
        ("(big:1.5) cat", [("big", 1.5), (" cat", 1.0)]),
        ("(big: .5 )", [("big", 0.5)]),
        ("(big:-1)", [("big", -1.0)]),
        ("((very:1.2) big:1.5)", [("very", 1.8), (" big", 1.5)]),
        ("[less (more:2)]", [("less ", LESS), ("more", 2 * LESS)]),
        (r"a \(big\) \[cat\]", [("a (big) [cat]", 1.0)]),
        (r"(smile :\):1.3)", [("smile :)", 1.3)]),
        ("ratio 16:9", [("ratio 16:9", 1.0)]),
        ("(a: b)", [("a: b", MORE)]),
        ("(style of a:b:1.2)", [("style of a:b", 1.2)]),
        ("BREAKFAST AND1 sAND", [("BREAKFAST AND1 sAND", 1.0)]),
        (r"back\slash", [(r"back\slash", 1.0)]),
        (r"\\(big)", [("\\", 1.0), ("big", MORE)]),
        ("a <cat-toy> 1<2", [("a <cat-toy> 1<2", 1.0)]),
    ],
)
def test_weights_and_escapes(text, wanted):
    assert _read(text) == [[(text, round(weight, 4)) for text, weight in wanted]]


def test_break_begins_a_new_part():
    assert _read("a cat BREAK a (dog BREAK big:1.2)") == [
        [("a cat", 1.0)],
        [("a ", 1.0), ("dog", 1.2)],
        [("big", 1.2)],
    ]


def test_loras_are_taken_out_with_their_weights():
    read = parse_prompt("a cat <lora:fur:0.8>, <lora:old style:1:-0.5><lora:plain>", "prompt")
    assert read.loras == (
        LoraTag("fur", 0.8, 0.8, 6, 20),
        LoraTag("old style", -0.5, 1.0, 22, 45),
        LoraTag("plain", 1.0, 1.0, 45, 57),
    )
    assert read.text == "a cat , "


@pytest.mark.parametrize(
    ("text", "character", "says"),
    [
        ("a (cat", 3, "never closed"),
        ("a (cat [dog)", 12, "closes nothing"),
        ("a cat)", 6, "closes nothing"),
        ("a cat :1.2)", 11, "closes nothing"),
        ("a [cat:1.2)", 11, "closes nothing"),
        ("(cat:1,2)", 6, "not a weight"),
        ("(cat:1.2.3)", 6, "not a weight"),
        ("(cat:1.2x)", 6, "not a weight"),
        ("(cat:)", 6, "not a weight"),
        ("(cat:1e99)", 6, "must be -10 to 10"),
        ("(cat:nan)", 6, "must be -10 to 10"),
        ("(cat: Inf )", 7, "must be -10 to 10"),
        ("(cat:11)", 6, "must be -10 to 10"),
        ("cat AND dog", 5, "lower case"),
        ("a [cat:dog:bird:0.5]", 3, "is neither '\\[from:to:when\\]' nor '\\[a|b\\]'"),
        ("a [cat|dog:0.5]", 3, "in brackets of its own"),
        ("a [cat|dog:bird]", 3, "is neither"),
        ("(cat:1e0)", 6, "not a weight"),
        ("(cat:1_0)", 6, "not a weight"),
        ("a <lora:fur:0.5", 3, "never closed"),
        ("a <lora::0.5>", 3, "is not '<lora:name:weight>'"),
        ("a <lora:fur:1:2:3>", 3, "'3' in a LoRA's tag is not offered"),
        ("a <lora:fur:1:lbw=ALL>", 3, "'lbw=ALL' in a LoRA's tag is not offered"),
        ("a <lora:fur:much>", 3, "not a weight"),
        ("a <lora:fur:5>", 3, "must be -4 to 4"),
        ("a <hypernet:fur:1>", 3, "not offered"),
        ("(" * 21 + "a" + ")" * 21, 21, "at most 20"),
    ],
)
def test_a_mistake_is_pointed_at(text, character, says):
    with pytest.raises(InvalidField, match=says) as caught:
        parse_prompt(text, "negative_prompt")
    assert caught.value.message.startswith(f"character {character}:")
    assert caught.value.field == "negative_prompt"


@given(st.text(alphabet="ab ()[]:<>\\|.12BREAKND,", max_size=40))
def test_any_text_is_read_or_refused(text):
    with suppress(InvalidField):
        parse_prompt(text, "prompt")


@given(st.text(alphabet=st.characters(exclude_characters="()[]\\<BA"), max_size=60))
def test_text_without_marks_is_itself(text):
    segments = read_weights(parse_prompt(text, "prompt").text)[0]
    assert "".join(segment.text for segment in segments) == (text if text.strip() else "")
