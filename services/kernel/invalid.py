"""What pydantic found wrong with a value, in our words. Names no field: the caller knows where the value came from."""

from typing import Any

_WORDS = {
    "missing": "is missing",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
}


def in_our_words(problem: Any) -> str:
    """`problem`: one of a ValidationError's `errors()`."""
    kind, limits = str(problem["type"]), problem.get("ctx", {})
    if kind == "greater_than_equal":
        return f"must be at least {_number(limits['ge'])}"
    if kind == "greater_than":
        return f"must be above {_number(limits['gt'])}"
    if kind == "less_than_equal":
        return f"must be at most {_number(limits['le'])}"
    if kind == "less_than":
        return f"must be below {_number(limits['lt'])}"
    if kind == "literal_error":
        return f"must be {limits['expected']}"
    if kind == "value_error":
        return str(limits["error"])
    if kind.startswith(("datetime", "timezone")):
        return "must be a time such as 2026-01-31T12:00:00Z"
    return _WORDS.get(kind, "cannot be read")


def _number(limit: float) -> str:
    return f"{limit:.0f}" if float(limit).is_integer() else f"{limit:g}"
