"""Named parameters on the wire: values as a Struct, descriptions as protobuf. Decides nothing about any annotator."""

from google.protobuf import struct_pb2

from fanlight.preprocessor.v1 import preprocessor_pb2
from services.kernel.errors import InvalidField
from services.kernel.parameters import Parameter, Value

_Kind = preprocessor_pb2.Parameter

_KIND_OF: dict[type, "preprocessor_pb2.Parameter.Kind.ValueType"] = {
    bool: _Kind.KIND_BOOLEAN,
    int: _Kind.KIND_INTEGER,
    float: _Kind.KIND_NUMBER,
    str: _Kind.KIND_TEXT,
}


def plain(values: struct_pb2.Struct) -> dict[str, object]:
    """Numbers, texts and booleans as they are; None for anything else, which no parameter takes."""
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
    """The parameter that a message describes. InvalidField when its default is not of its kind."""
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
