"""Checks of single fields, each with a message that says what would be right."""

import math
from collections.abc import Sequence

from fanlight.errors import InvalidField, TooLarge

# From here on, digits say less than an exponent.
DIGITS_BELOW = 1e15


def format_number(number: float) -> str:
    """Whole numbers with all of their digits, others as `%g` writes them."""
    return f"{number:.0f}" if float(number).is_integer() and abs(number) < DIGITS_BELOW else f"{number:g}"


def check_number(value: float, low: float, high: float, *, field: str) -> float:
    """The value if it is finite and within low and high, both included; else InvalidField."""
    if not math.isfinite(value) or not low <= value <= high:
        limits = f"{format_number(low)} to {format_number(high)}"
        raise InvalidField(f"is {format_number(value)}; must be {limits}", field=field)
    return value


def check_whole(value: int, low: int, high: int, *, field: str) -> int:
    """The value if it is within low and high, both included; else InvalidField."""
    if not low <= value <= high:
        raise InvalidField(f"is {value}; must be {low} to {high}", field=field)
    return value


def check_bytes(value: str, limit_bytes: int, *, field: str) -> str:
    """The text if it has at most so many bytes in UTF-8; else TooLarge."""
    size_bytes = len(value.encode())
    if size_bytes > limit_bytes:
        raise TooLarge(f"has {size_bytes} bytes; at most {limit_bytes} are taken", field=field)
    return value


def check_some_bytes(value: str, limit_bytes: int, *, field: str) -> str:
    """The text if it is not empty and has at most so many bytes in UTF-8; else InvalidField or TooLarge."""
    if not value:
        raise InvalidField("must not be empty", field=field)
    return check_bytes(value, limit_bytes, field=field)


def check_characters(value: str, limit: int, *, field: str) -> str:
    """The text if it has at most so many characters; else TooLarge."""
    if len(value) > limit:
        raise TooLarge(f"has {len(value)} characters; at most {limit} are taken", field=field)
    return value


def check_count(count: int, limit: int, *, field: str) -> None:
    """InvalidField if a list has more entries than the limit."""
    if count > limit:
        raise InvalidField(f"has {count} entries; at most {limit} are taken", field=field)


def check_choice(value: str, choices: Sequence[str], *, field: str) -> str:
    """The text if it is empty or one of the choices; else InvalidField."""
    if value and value not in choices:
        raise InvalidField(f"is {value[:80]!r}; must be {', '.join(choices)}, or empty", field=field)
    return value
