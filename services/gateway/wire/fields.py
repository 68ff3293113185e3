"""Checks of single fields, each with a message that says what would be right."""

import math

from services.kernel.errors import InvalidField, TooLarge
from services.kernel.numbers import told


def number(value: float, low: float, high: float, *, field: str) -> float:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidField(f"is {told(value)}; must be {told(low)} to {told(high)}", field=field)
    return value


def whole(value: int, low: int, high: int, *, field: str) -> int:
    if not low <= value <= high:
        raise InvalidField(f"is {value}; must be {low} to {high}", field=field)
    return value


def text(value: str, limit_bytes: int, *, field: str) -> str:
    size_bytes = len(value.encode())
    if size_bytes > limit_bytes:
        raise TooLarge(f"has {size_bytes} bytes; at most {limit_bytes} are taken", field=field)
    return value


def some_text(value: str, limit_bytes: int, *, field: str) -> str:
    if not value:
        raise InvalidField("must not be empty", field=field)
    return text(value, limit_bytes, field=field)
