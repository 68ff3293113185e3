"""Prompts that change from step to step, by A1111's own worked values."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanlight.contract.limits import PROMPT_CHANGES_DEPTH_LIMIT, PROMPT_CHANGES_LIMIT
from fanlight.contract.prompt import FORGIVING, parse_prompt
from fanlight.contract.prompt_schedule import parse_template
from fanlight.errors import InvalidField

ALTERNATING = [(step, ("a", "(b:1.1)")[(step - 1) % 2]) for step in range(1, 11)]
FEMALE = [(step, ("female", "male")[(step - 1) % 2]) for step in range(1, 11)]
FOUR_OPTIONS = [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)]


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        # The doctests of get_learned_conditioning_prompt_schedules in A1111's modules/prompt_parser.py, 10 steps.
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(5, "a  c"), (10, "a {b|d{ c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", ALTERNATING),
        ("[fe|]male", FEMALE),
        ("[fe|||]male", FOUR_OPTIONS),
        # Computed with its grammar.
        ("a [b::3] c", [(3, "a b c"), (10, "a  c")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:10]", [(10, "a")]),
        ("[a:b:30]", [(10, "a")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1.5]", [(10, "a")]),
        ("[a:b:0.55 ]", [(5, "a"), (10, "b")]),
        ("[a:b:1e999]", [(10, "a")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a]", [(10, "[a]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[[a:b]:3]", [(10, "[[a:b]:3]")]),
        ("[a (b:3]", [(10, "[a (b:3]")]),
        (r"\[a:b:3]", [(10, r"\[a:b:3]")]),
        (r"[a\:b:3]", [(3, ""), (10, r"a\:b")]),
    ],
)
def test_a_prompt_changes_at_a1111s_steps(text: str, turns: list[tuple[int, str]]) -> None:
    assert list(parse_template(text).schedule(10)) == turns


def test_a1111s_own_example_changes_as_it_says() -> None:
    text = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert list(parse_template(text).schedule(100)) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@given(st.text(alphabet="ab ([)]:|.31\\", max_size=40), st.integers(1, 12))
def test_a_schedule_ends_with_the_last_step_in_rising_order(text: str, steps: int) -> None:
    ends = [end for end, _ in parse_template(text).schedule(steps)]
    assert ends[-1] == steps
    assert ends == sorted(set(ends))
    assert ends[0] >= 1


@pytest.mark.parametrize(
    "text",
    ["[" * 10_000, "]" * 10_000, "[a:" * 3_333, "[a:" * 1_666 + "]" * 1_666, "(" * 5_000 + ")" * 5_000, "[a|" * 3_333],
)
def test_ten_thousand_brackets_are_read_soon(text: str) -> None:
    began_s = time.process_time()
    parse_prompt(text, "prompt", FORGIVING).texts(150)
    # Quadratic work would take minutes.
    assert time.process_time() - began_s < 10


def test_changes_stand_in_one_another_up_to_a_limit() -> None:
    nested = "a"
    for number in range(50):
        nested = f"[{nested}:b{number}:{number + 1}]"
    parsed = parse_prompt(nested, "prompt", FORGIVING)
    assert parsed.texts(60) == ["a", *(f"b{number}" for number in range(50))]
    assert parsed.warnings == ()
    for _ in range(PROMPT_CHANGES_DEPTH_LIMIT):
        nested = f"[{nested}:b:0.5]"
    with pytest.raises(InvalidField, match=r"in one another; at most 64"):
        parse_prompt(nested, "prompt", FORGIVING)
    with pytest.raises(InvalidField, match=r"is bracket 21 within others; at most 20"):
        parse_prompt(nested, "prompt")


def test_there_are_so_many_changes_and_no_more() -> None:
    assert parse_prompt("[a|b]" * PROMPT_CHANGES_LIMIT, "prompt").has_changes
    with pytest.raises(InvalidField, match=r"has more than 200 of"):
        parse_prompt("[a|b]" * (PROMPT_CHANGES_LIMIT + 1), "prompt")
