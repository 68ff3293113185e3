"""PEFT's patterns of names mean what they mean in Python's regular expressions, and none takes long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from services.diffusion.models.name_patterns import STEPS_LIMIT, BadPattern, PatternWork, first_match, read_pattern

NAMES = (
    "to_k",
    "attn2.to_k",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.10.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "text_model.encoder.layers.11.self_attn.q_proj",
    "conv_in",
    "attn2_to_k",
    "",
)
PATTERNS = (
    "to_k",
    "attn2.to_k",
    r".*attn2\.to_k",
    r"attn2\.to_k",
    r"down_blocks\.\d+\.attentions\.\d\..*\.to_(k|q)",
    r"down_blocks\.(0|1)\..*",
    r"layers\.1[01]\.self_attn\.[qkv]_proj",
    r"[^.]+",
    r"(?:\w+\.)*to_out\.0",
    r"^down_blocks.*",
    r"^conv_in$",
    r"(?!text_model).*_proj",
    r".*(?=\.0).*",
    r"to_\w{1,3}",
    r"to_k?",
    r"to_k??",
    r"\bto_k\b",
    r"a{0}to_k",
    r"to_[a-z]{,3}",
    r"(to_k|)",
    r"()*to_k",
    r"(a*)*to_k",
    r".+\.to_k",
    r"[]t]o_k",
    r"[\w.]*\.0",
)


def found(pattern, name, work=None):
    return read_pattern(pattern)(name, work or PatternWork())


def as_peft(pattern, name):
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_finds_what_pefts_own_line_finds(pattern):
    assert [found(pattern, name) for name in NAMES] == [as_peft(pattern, name) for name in NAMES]


ATOMS = some.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", "^", "$", r"\b", "(a|b.)", "(?:ab|)", "(?!a)"])
REPEATED = some.builds(
    str.__add__, ATOMS, some.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{,1}", "{1,}"])
)


@settings(max_examples=300, deadline=None)
@given(some.lists(REPEATED, min_size=1, max_size=5), some.text("ab._", max_size=6))
def test_random_patterns_agree_with_pythons(pieces, name):
    pattern = "".join(pieces)
    try:
        wanted = as_peft(pattern, name)
    except re.error:
        return
    assert found(pattern, name) == wanted


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|aa)+$b", "(.*)*" * 8 + "x", ".*" * 200 + "x", "((a{0,99}){0,99}){0,99}b", "(a*)*" * 80],
)
def test_patterns_that_never_end_elsewhere_end_here(pattern):
    work = PatternWork()
    assert not found(pattern, "a" * 300 + "!", work)
    assert work.steps < 200_000


def test_work_without_an_end_is_refused():
    with pytest.raises(BadPattern, match="take more than"):
        found("(a*)*", "a" * 300, PatternWork(steps=STEPS_LIMIT))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "never closed"),
        (")", "too many"),
        ("*", "where nothing can be repeated"),
        ("[a", "where nothing can be"),
        ("[z-a]", "no class"),
        (r"(a)\1", "not read"),
        ("(?<=a)b", "kind that is not read"),
        ("(?P<n>a)", "kind that is not read"),
        ("a{1000}", "at most 100"),
        ("a{}", "no count"),
        ("(" * 21 + ")" * 21, "within each other"),
        ("a" * 501, "at most 500"),
        ("a\\", "not read"),
    ],
)
def test_a_pattern_that_is_not_read_is_refused_by_what_is_in_it(pattern, why):
    with pytest.raises(BadPattern, match=why):
        read_pattern(pattern)


def test_the_first_pattern_that_matches_decides():
    patterns = {"to_q": 1.0, r".*\.to_k": 2.0, "attn2.to_k": 3.0}
    assert first_match(patterns, "blocks.0.attn2.to_k", PatternWork()) == 2.0
    assert first_match(patterns, "blocks.0.attn2.to_v", PatternWork()) is None
