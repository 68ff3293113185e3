"""What pydantic found wrong with a value, in our words. Names no field: the caller knows where the value came from."""

from typing import Any

from fanlight.contract.fields import format_number

_WORDS = {
    "missing": "is missing",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}


def in_our_words(problem: Any) -> str:
    """`problem`: one of a ValidationError's `errors()`."""
    kind = str(problem["type"])
    if kind.startswith(("datetime", "timezone")):
        return "must be a time such as 2026-01-31T12:00:00Z"
    limits = {
        name: format_number(each) if isinstance(each, int | float) else each
        for name, each in problem.get("ctx", {}).items()
    }
    return _WORDS.get(kind, "cannot be read").format(**limits)
