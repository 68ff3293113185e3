"""In the syntax `a1111` mistakes are read as A1111 reads them, and said; `plain` knows no mistakes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanlight.contract import generation
from fanlight.contract.limits import PROMPT_AND_LIMIT
from fanlight.contract.prompt import FORGIVING, PLAIN, STRICT, check_prompt, loras_in, parse_prompt, read_weights
from fanlight.contract.warnings import WARNINGS_LIMIT
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest
from fanlight.errors import InvalidField


def read(text: str, emphasis: str = "original") -> list[tuple[str, float]]:
    [part] = read_weights(text, FORGIVING, emphasis)
    return [(segment.text, segment.weight) for segment in part]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        # The doctests of parse_prompt_attention in A1111's modules/prompt_parser.py.
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            # Without the space of weight 1.1 between `house` and `on`, which makes no token.
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        # Computed with its rules.
        ("apple :) cute", [("apple :) cute", 1.0)]),
        ("(best quality:1.2, apple", [("best quality:1.2, apple", 1.1)]),
        ("a] b", [("a] b", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        ("(a:1.2x)", [("a:1.2x", 1.1)]),
        ("(a: +.5 )", [("a", 0.5)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("[a:1.2)", [("a:1.2)", 1 / 1.1)]),
        (r"back\slash", [("backslash", 1.0)]),
    ],
)
def test_weights_are_a1111s(text: str, segments: list[tuple[str, float]]) -> None:
    assert read(text) == [(text, pytest.approx(weight, rel=1e-12)) for text, weight in segments]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("apple :) cute", ["character 8: ')' closes nothing and is taken as text"]),
        ("(best quality:1.2, apple", ["character 1: '(' is never closed and counts to the end"]),
        ("(a:1.2x)", ["character 4: '1.2x' is not a weight and is taken as text"]),
        ("(a:99)", ["character 4: the weight '99' is beyond -10 to 10"]),
        ("<lora:a:b>", ["character 1: 'b' is not a weight such as 1.2; it is left out"]),
        ("<lora:a", ["character 1: '<lora:' is never closed by a '>'; it is taken as text"]),
        ("[a:b:c:3]", ["character 1: is neither '[from:to:when]' nor '[a|b]', and is taken as text"]),
        ("<lora:x:1> a (b AND c", [
            "character 17: 'AND' ends all brackets around it", "character 14: '(' is never closed and counts to the end"
        ]),
        ("an (important) [word:3]", []),
    ],
)  # fmt: skip
def test_what_was_mended_is_said(text: str, says: list[str]) -> None:
    assert list(parse_prompt(text, "prompt", FORGIVING).warnings) == says
    if says:
        with pytest.raises(InvalidField, match="character"):
            parse_prompt(text, "prompt", STRICT)


def test_warnings_name_their_field_and_are_few() -> None:
    request = GenerateRequest(prompt="a )", negative_prompt="(", prompt_syntax="a1111")
    assert generation.warnings_of(request) == (
        "prompt: character 3: ')' closes nothing and is taken as text",
        "negative_prompt: character 1: '(' is never closed and counts to the end",
    )
    request.prompt = ")" * 10_000
    generation.check(request)
    assert len(generation.warnings_of(request)) == WARNINGS_LIMIT


@pytest.mark.parametrize("text", ["(" * 10_000, ")" * 10_000, "[(" * 5_000, "(a" * 3_333 + ")" * 3_333, "(a:2" * 2_500])
def test_ten_thousand_brackets_have_weights_that_are_sound(text: str) -> None:
    generation.check(GenerateRequest(prompt=text, negative_prompt=text, prompt_syntax="a1111"))
    assert all(0.1 < weight < 10 for _, weight in read(text))


def test_a_change_that_never_comes_is_said() -> None:
    request = GenerateRequest(prompt="[a:b:30]", steps=20)
    assert generation.warnings_of(request) == ("prompt: the change at 30 is outside the 20 steps and never comes",)
    request = GenerateRequest(prompt="[a:b:15]", steps=20, strength=0.5)
    request.image.data = b"x"
    assert generation.warnings_of(request) == ("prompt: the change at step 16 never comes, because 10 of 20 steps run",)
    request.strength = 1.0
    assert generation.warnings_of(request) == ()


def test_a_lora_in_the_negative_prompt_is_left_out_and_said() -> None:
    request = GenerateRequest(negative_prompt="bad <lora:x:1>", prompt_syntax="a1111")
    generation.check(request)
    assert generation.warnings_of(request) == (
        "negative_prompt: the LoRA x is left out; it belongs in the prompt",
    )  # fmt: skip


def test_plain_prompts_have_no_syntax() -> None:
    text = "(a:1.2) [b|c] AND <lora:x:1> BREAK d)"
    assert loras_in(text, PLAIN) == []
    assert parse_prompt(text, "prompt", PLAIN).texts(20) == [text]
    [[segment]] = read_weights(text, PLAIN)
    assert (segment.text, segment.weight) == (text, 1.0)


def test_emphasis_is_ignored_or_text() -> None:
    assert read("a (b:1.5) \\(c", "ignore") == [("a b (c", 1.0)]
    assert read("a (b:1.5) BREAK c", "none") == [("a (b:1.5) BREAK c", 1.0)]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        # By get_multicond_prompt_list in A1111's modules/prompt_parser.py.
        ("left AND right:0.5", [("left", 1.0), (" right", 0.5)]),
        ("a AND b AND c:2", [("a", 1.0), (" b", 1.0), (" c", 2.0)]),
        ("a :1.2 AND b:-.5", [("a", 1.2), (" b", -0.5)]),
        ("a (b:1.1) AND c", [("a (b:1.1)", 1.0), (" c", 1.0)]),
        # Other than there a prompt alone has no weight: its colon is text.
        ("at 10:30", [("at 10:30", 1.0)]),
        ("BRAND SAND", [("BRAND SAND", 1.0)]),
    ],
)
def test_prompts_are_composed_with_weights(text: str, prompts: list[tuple[str, float]]) -> None:
    for syntax in (STRICT, FORGIVING):
        parsed = parse_prompt(text, "prompt", syntax)
        assert [(each.template.text_at(1, 1), each.weight) for each in parsed.prompts] == prompts


def test_thousands_of_prompts_are_refused_at_once() -> None:
    for syntax in (STRICT, FORGIVING):
        with pytest.raises(InvalidField, match="composes 2000 prompts with AND; at most 8"):
            parse_prompt(" AND ".join("a" * 2_000), "prompt", syntax)
    assert len(parse_prompt(" AND ".join("a" * PROMPT_AND_LIMIT), "prompt").prompts) == PROMPT_AND_LIMIT


def test_an_and_in_the_negative_prompt_is_text() -> None:
    parsed = parse_prompt("a AND b", "negative_prompt", FORGIVING)
    assert parsed.texts(20) == ["a AND b"]
    assert parsed.warnings == ("character 3: 'AND' is text here",)


def test_so_many_texts_in_turn_and_no_more() -> None:
    with pytest.raises(InvalidField, match="changes into 143 texts; at most 64"):
        check_prompt("[" + "|".join("abcdefghijk") + "][" + "|".join("abcdefghijklm") + "]", "prompt", steps=150)
    with pytest.raises(InvalidField, match="characters; at most 40000"):
        check_prompt("[a|b|c|d|e]" + "x" * 9_000, "prompt")
    with pytest.raises(InvalidField, match="8 with those of the other prompt, which may fill 80 parts"):
        generation.check(GenerateRequest(prompt="[a|b|c|d|e|f|g]", negative_prompt="x" * 6_000))


@settings(deadline=None)
@given(st.text(alphabet="ab ()[]:<>|.12BREAKND,", max_size=40), st.integers(1, 8))
def test_what_is_sound_reads_the_same_in_both_syntaxes(text: str, steps: int) -> None:
    try:
        strict = parse_prompt(text, "prompt", STRICT)
    except InvalidField:
        return
    forgiving = parse_prompt(text, "prompt", FORGIVING)
    assert forgiving.warnings == ()
    assert forgiving.prompts == strict.prompts
    for each in strict.texts(steps):
        assert read_weights(each, STRICT) == read_weights(each, FORGIVING)


@settings(deadline=None)
@given(st.text(alphabet="ab ()[]:<>\\|.12BREAKND,lora", max_size=60))
def test_any_text_is_taken(text: str) -> None:
    parsed = parse_prompt(text, "prompt", FORGIVING) if text.count("AND") < PROMPT_AND_LIMIT else None
    for each in parsed.texts(10) if parsed else ():
        read_weights(each, FORGIVING)
