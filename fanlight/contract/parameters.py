"""Named parameters on the wire: values as a Struct, descriptions as preprocessor.v1.Parameter. Knows no annotator."""

import math
from collections.abc import Mapping, Sequence

from google.protobuf import struct_pb2

from fanlight.contract.limits import PARAMETERS_LIMIT_BYTES
from fanlight.contract.parameter_values import Parameter, Value, canonical, fill
from fanlight.errors import InvalidField, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2

__all__ = [
    "Parameter",
    "Value",
    "canonical",
    "check_struct",
    "described",
    "description",
    "fill",
    "filled",
    "plain",
    "struct_of",
]

_Kind = preprocessor_pb2.Parameter
_KIND_OF: dict[type, "preprocessor_pb2.Parameter.Kind.ValueType"] = {
    bool: _Kind.KIND_BOOLEAN,
    int: _Kind.KIND_INTEGER,
    float: _Kind.KIND_NUMBER,
    str: _Kind.KIND_TEXT,
}


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
