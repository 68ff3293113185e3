"""An annotator's parameters: described by workers, given by clients, sent to workers."""

import json
from collections.abc import Mapping

from google.protobuf import struct_pb2

from fanlight.preprocessor.v1 import preprocessor_pb2
from services.gateway.jobs.workers import Annotator
from services.kernel.errors import InvalidField
from services.kernel.parameters import Parameter, Value, canonical, fill

_Kind = preprocessor_pb2.Parameter

KIND_OF: dict[type, "preprocessor_pb2.Parameter.Kind.ValueType"] = {
    bool: _Kind.KIND_BOOLEAN,
    int: _Kind.KIND_INTEGER,
    float: _Kind.KIND_NUMBER,
    str: _Kind.KIND_TEXT,
}


def given(values: struct_pb2.Struct, annotator: Annotator, *, field: str) -> str:
    """Canonical JSON of all the annotator's parameters. InvalidField."""
    return canonical(fill(annotator.parameters, plain(values), field=field))


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


def struct_of(canonical_json: str) -> struct_pb2.Struct:
    values: Mapping[str, Value] = json.loads(canonical_json)
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def described(message: preprocessor_pb2.Parameter, *, field: str) -> Parameter:
    default = _plain(message.default_value)
    if message.kind == _Kind.KIND_INTEGER and isinstance(default, float) and default.is_integer():
        default = int(default)
    if default is None or KIND_OF[type(default)] != message.kind:
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
    default = struct_pb2.Value()
    if isinstance(parameter.default, bool):
        default.bool_value = parameter.default
    elif isinstance(parameter.default, str):
        default.string_value = parameter.default
    else:
        default.number_value = parameter.default
    return preprocessor_pb2.Parameter(
        name=parameter.name,
        kind=KIND_OF[type(parameter.default)],
        description=parameter.description,
        default_value=default,
        minimum=parameter.minimum,
        maximum=parameter.maximum,
        choices=parameter.choices,
    )
