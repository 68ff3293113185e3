"""Named parameters with kinds, ranges and defaults: described once, checked wherever they arrive.

Values travel as a Struct, descriptions as preprocessor.v1.Parameter. Knows no annotator.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf import struct_pb2

from fanlight.contract.fields import format_number
from fanlight.contract.limits import PARAMETERS_LIMIT_BYTES
from fanlight.errors import InvalidField, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2

_Kind = preprocessor_pb2.Parameter
_KIND_OF: dict[type, "preprocessor_pb2.Parameter.Kind.ValueType"] = {
    bool: _Kind.KIND_BOOLEAN,
    int: _Kind.KIND_INTEGER,
    float: _Kind.KIND_NUMBER,
    str: _Kind.KIND_TEXT,
}
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
    """Every parameter with its value or default, in the order of the description. InvalidField names the wrong one."""
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
    """One text for the same values, whatever their order: part of cache keys."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def check_struct(values: struct_pb2.Struct, *, field: str) -> None:
    """TooLarge for more than 4096 bytes, InvalidField for a number that JSON has none for. Both name the field."""
    size_bytes = values.ByteSize()
    if size_bytes > PARAMETERS_LIMIT_BYTES:
        raise TooLarge(f"has {size_bytes} bytes; at most {PARAMETERS_LIMIT_BYTES} are taken", field=field)
    for name, value in values.fields.items():
        if not _is_finite(value):
            raise InvalidField("must be a finite number", field=f"{field}.{name}")


def _is_finite(value: struct_pb2.Value) -> bool:
    """Whether every number in it is finite."""
    match value.WhichOneof("kind"):
        case "number_value":
            return math.isfinite(value.number_value)
        case "struct_value":
            return all(map(_is_finite, value.struct_value.fields.values()))
        case "list_value":
            return all(map(_is_finite, value.list_value.values))
    return True


def filled(values: struct_pb2.Struct, parameters: Sequence[Parameter], *, field: str) -> struct_pb2.Struct:
    """All of the parameters, those left out with their defaults. InvalidField names the wrong one below `field`."""
    return struct_of(fill(parameters, plain(values), field=field))


def struct_of(values: Mapping[str, Value]) -> struct_pb2.Struct:
    """The values as they travel: a whole number as a number without a fraction."""
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def plain(values: struct_pb2.Struct) -> dict[str, object]:
    """Numbers, strings and booleans as they are; None for anything else, which no parameter takes."""
    return {name: _plain(value) for name, value in values.fields.items()}


def _plain(value: struct_pb2.Value) -> bool | float | str | None:
    match value.WhichOneof("kind"):
        case "bool_value":
            return value.bool_value
        case "number_value":
            return value.number_value
        case "string_value":
            return value.string_value
    return None


def described(message: preprocessor_pb2.Parameter, *, field: str) -> Parameter:
    """The parameter that a message describes. InvalidField, below `field`, when its default is not of its kind."""
    default = _plain(message.default_value)
    if message.kind == _Kind.KIND_INTEGER and isinstance(default, float) and default.is_integer():
        default = int(default)
    if default is None or _KIND_OF[type(default)] != message.kind:
        raise InvalidField("is not of the parameter's kind", field=f"{field}.default_value")
    return Parameter(
        name=message.name,
        default=default,
        description=message.description,
        minimum=message.minimum if message.HasField("minimum") else None,
        maximum=message.maximum if message.HasField("maximum") else None,
        choices=tuple(message.choices),
    )


def description(parameter: Parameter) -> preprocessor_pb2.Parameter:
    """The message that describes the parameter."""
    return preprocessor_pb2.Parameter(
        name=parameter.name,
        kind=_KIND_OF[type(parameter.default)],
        description=parameter.description,
        default_value=_wrapped(parameter.default),
        minimum=parameter.minimum,
        maximum=parameter.maximum,
        choices=parameter.choices,
    )


def _wrapped(value: Value) -> struct_pb2.Value:
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=value)
    return struct_pb2.Value(number_value=value)
