"""An answer holds a few short warnings."""

from fanlight.contract.warnings import WARNING_CHARACTERS_LIMIT, WARNINGS_LIMIT, bounded_warnings


def test_each_warning_is_told_once_in_order() -> None:
    assert bounded_warnings(["b", "a", "", "b"]) == ("b", "a")


def test_a_long_warning_is_cut() -> None:
    [cut] = bounded_warnings(["x" * 10_000])
    assert len(cut) == WARNING_CHARACTERS_LIMIT
    assert cut.endswith("x…")


def test_of_many_warnings_the_first_are_told_and_the_others_counted() -> None:
    told = bounded_warnings(map(str, range(100)))
    assert len(told) == WARNINGS_LIMIT
    assert told[:2] == ("0", "1")
    assert told[-1] == "85 more warnings are not shown"
