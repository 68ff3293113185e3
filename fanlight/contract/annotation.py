"""Checks an AnnotateRequest as far as that needs no worker, and converts annotators' parameters from and to protobuf.

Knows no annotator: workers describe their parameters. Fields in errors are relative to the request, such as
`parameters.low_threshold`.
"""

import math
from collections.abc import Mapping, Sequence

from google.protobuf import struct_pb2

from fanlight.contract.images import check_source
from fanlight.contract.limits import (
    ANNOTATION_SIDE_MAX_PX,
    ANNOTATION_SIDE_MIN_PX,
    NAME_LIMIT_BYTES,
    PARAMETERS_LIMIT_BYTES,
    check_bytes,
    check_whole,
)
from fanlight.contract.parameters import Parameter, Value, fill
from fanlight.errors import InvalidField, TooLarge
from fanlight.preprocessor.v1 import preprocessor_pb2
from fanlight.preprocessor.v1.preprocessor_pb2 import AnnotateRequest


def check(request: AnnotateRequest) -> None:
    """InvalidField or TooLarge about the first field that no worker could accept."""
    if not request.annotator:
        raise InvalidField("is missing; name an annotator", field="annotator")
    check_bytes(request.annotator, NAME_LIMIT_BYTES, field="annotator")
    check_source(request.image, "image")
    check_struct(request.parameters, field="parameters")
    check_size(request.width_px, request.height_px)


def check_size(width_px: int, height_px: int) -> None:
    """InvalidField, fields `width_px` and `height_px`, unless both are 0 or both 16 to 8192."""
    if not width_px and not height_px:
        return
    for field, side_px in (("width_px", width_px), ("height_px", height_px)):
        if not side_px:
            raise InvalidField("is missing: give both sides or none", field=field)
        check_whole(side_px, ANNOTATION_SIDE_MIN_PX, ANNOTATION_SIDE_MAX_PX, field=field)


def check_parameters(request: AnnotateRequest, parameters: Sequence[Parameter]) -> struct_pb2.Struct:
    """All of the annotator's parameters, unset ones with their defaults. InvalidField below `parameters`.

    `parameters`: the annotator's descriptions. Serialized deterministically, equal parameters give equal bytes.
    """
    return filled(request.parameters, parameters, field="parameters")


_Kind = preprocessor_pb2.Parameter
_KIND_OF: dict[type, "preprocessor_pb2.Parameter.Kind.ValueType"] = {
    bool: _Kind.KIND_BOOLEAN,
    int: _Kind.KIND_INTEGER,
    float: _Kind.KIND_NUMBER,
    str: _Kind.KIND_TEXT,
}


def check_struct(values: struct_pb2.Struct, *, field: str) -> None:
    """TooLarge for more than 4096 bytes, InvalidField for NaN and infinity. Both name the field."""
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
    """All of the parameters, unset ones with their defaults. InvalidField names the wrong one below `field`."""
    return struct_of(fill(parameters, plain(values), field=field))


def struct_of(values: Mapping[str, Value]) -> struct_pb2.Struct:
    """The values as a Struct, which has only doubles: an integer becomes a number without a fraction."""
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def plain(values: struct_pb2.Struct) -> dict[str, object]:
    """Numbers, strings and booleans as Python values; None for anything else, which no parameter accepts."""
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
