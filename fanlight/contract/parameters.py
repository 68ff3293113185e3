"""A described parameter of an annotator: kind, range and default, and the check of its values. Pure: no protobuf."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fanlight.contract.limits import format_number
from fanlight.errors import InvalidField

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}

Value = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """The type of `default` is the parameter's kind: bool, int, float or str."""

    name: str
    default: Value
    description: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def parse(self, value: object, *, field: str) -> Value:
        """The value in the parameter's kind, or InvalidField."""
        typed = self._typed(value, field)
        if isinstance(typed, str):
            if self.choices and typed not in self.choices:
                raise InvalidField(f"is {typed!r}; must be one of {', '.join(self.choices)}", field=field)
        elif not isinstance(typed, bool) and not self._in_range(typed):
            raise InvalidField(f"is {typed}; must be {self._range()}", field=field)
        return typed

    def _typed(self, value: object, field: str) -> Value:
        kind = type(self.default)
        if kind is bool or kind is str:
            if isinstance(value, kind):
                return value
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            if kind is float:
                return float(value)
            if value == int(value):
                return int(value)
        raise InvalidField(f"must be {_KINDS[kind]}", field=field)

    def _in_range(self, value: float) -> bool:
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)

    def _range(self) -> str:
        low, high = ("" if each is None else format_number(each) for each in (self.minimum, self.maximum))
        if not high:
            return f"{low} or more"
        if not low:
            return f"{high} or less"
        return f"{low} to {high}"


def fill(
    parameters: Sequence[Parameter], given: Mapping[str, object], *, field: str = "parameters"
) -> dict[str, Value]:
    """Every parameter with its value or default, in the order of `parameters`. InvalidField names the wrong one."""
    known = {parameter.name: parameter for parameter in parameters}
    for name in given:
        if name not in known:
            raise InvalidField(
                f"is not known; the parameters are {', '.join(known) or 'none'}", field=f"{field}.{name}"
            )
    return {
        name: parameter.parse(given[name], field=f"{field}.{name}") if name in given else parameter.default
        for name, parameter in known.items()
    }


def canonical(values: Mapping[str, Value]) -> str:
    """The same string for equal values in any order, for cache keys."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
