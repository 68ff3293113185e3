"""Checks an AnnotateRequest as far as that needs no worker, and converts annotators' parameters from and to protobuf.

Knows no annotator: workers describe their parameters. Fields in errors are relative to the request, such as
`parameters.low_threshold`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from google.protobuf import struct_pb2

from fanlight.contract.images import check_source
from fanlight.contract.limits import (
    ANNOTATION_SIDE_MAX_PX,
    ANNOTATION_SIDE_MIN_PX,
    ANNOTATOR_PARAMETERS_LIMIT,
    NAME_LIMIT_BYTES,
    PARAMETER_CHOICES_LIMIT,
    PARAMETER_DESCRIPTION_LIMIT_BYTES,
    PARAMETER_NAME_LIMIT_BYTES,
    PARAMETERS_DEPTH_LIMIT,
    PARAMETERS_LIMIT_BYTES,
    PARAMETERS_VALUES_LIMIT,
    check_bytes,
    check_count,
    check_some_bytes,
    check_whole,
    format_number,
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
    """TooLarge for more than 4096 bytes. InvalidField for NaN, infinity, deep nesting and too many values."""
    size_bytes = values.ByteSize()
    if size_bytes > PARAMETERS_LIMIT_BYTES:
        raise TooLarge(f"has {size_bytes} bytes; at most {PARAMETERS_LIMIT_BYTES} are taken", field=field)
    count = 0
    for name, value in values.fields.items():
        for each, depth in _nested(value, 1):
            count += 1
            if depth > PARAMETERS_DEPTH_LIMIT:
                raise InvalidField(
                    f"is nested; at most {PARAMETERS_DEPTH_LIMIT} levels are taken", field=f"{field}.{name}"
                )
            if each.HasField("number_value") and not math.isfinite(each.number_value):
                raise InvalidField("must be a finite number", field=f"{field}.{name}")
    if count > PARAMETERS_VALUES_LIMIT:
        raise InvalidField(f"has {count} values; at most {PARAMETERS_VALUES_LIMIT} values are taken", field=field)


def _nested(value: struct_pb2.Value, depth: int) -> Iterator[tuple[struct_pb2.Value, int]]:
    """The value and all values in it, with their depths; nothing below the first one that is too deep."""
    yield value, depth
    if depth > PARAMETERS_DEPTH_LIMIT:
        return
    for each in (*value.struct_value.fields.values(), *value.list_value.values):
        yield from _nested(each, depth + 1)


def filled(values: struct_pb2.Struct, parameters: Sequence[Parameter], *, field: str) -> struct_pb2.Struct:
    """All of the parameters, unset ones with their defaults.

    InvalidField names the wrong one below `field`; TooLarge for more than 4096 bytes in all.
    """
    whole = struct_of(fill(parameters, plain(values), field=field))
    if (size_bytes := whole.ByteSize()) > PARAMETERS_LIMIT_BYTES:
        raise TooLarge(
            f"has {size_bytes} bytes with its defaults; at most {PARAMETERS_LIMIT_BYTES} are taken", field=field
        )
    return whole


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


def described_all(messages: Sequence[preprocessor_pb2.Parameter], *, field: str) -> tuple[Parameter, ...]:
    """An annotator's parameters. InvalidField and TooLarge, at or below `field`.

    Each name occurs once, and the defaults leave room for a request: they fit the limit of its parameters.
    """
    check_count(len(messages), ANNOTATOR_PARAMETERS_LIMIT, field=field)
    parameters = tuple(described(each, field=f"{field}[{index}]") for index, each in enumerate(messages))
    names: set[str] = set()
    for index, parameter in enumerate(parameters):
        if parameter.name in names:
            raise InvalidField(
                f"there is {parameter.name!r} twice; names must be unique", field=f"{field}[{index}].name"
            )
        names.add(parameter.name)
    filled(struct_pb2.Struct(), parameters, field=field)
    return parameters


def described(message: preprocessor_pb2.Parameter, *, field: str) -> Parameter:
    """The parameter that a message describes. InvalidField and TooLarge, below `field`, where no request could use it.

    Its default is of its kind, within its bounds and among its choices; bounds are finite and in order.
    """
    check_some_bytes(message.name, PARAMETER_NAME_LIMIT_BYTES, field=f"{field}.name")
    check_bytes(message.description, PARAMETER_DESCRIPTION_LIMIT_BYTES, field=f"{field}.description")
    check_count(len(message.choices), PARAMETER_CHOICES_LIMIT, field=f"{field}.choices")
    for index, choice in enumerate(message.choices):
        check_bytes(choice, PARAMETER_NAME_LIMIT_BYTES, field=f"{field}.choices[{index}]")
    _check_bounds(message, field)
    default = _plain(message.default_value)
    if message.kind == _Kind.KIND_INTEGER and isinstance(default, float) and default.is_integer():
        default = int(default)
    if default is None or _KIND_OF[type(default)] != message.kind:
        raise InvalidField("is not of the parameter's kind", field=f"{field}.default_value")
    parameter = Parameter(
        name=message.name,
        default=default,
        description=message.description,
        minimum=message.minimum if message.HasField("minimum") else None,
        maximum=message.maximum if message.HasField("maximum") else None,
        choices=tuple(message.choices),
    )
    parameter.parse(default, field=f"{field}.default_value")
    return parameter


def _check_bounds(message: preprocessor_pb2.Parameter, field: str) -> None:
    for bound in ("minimum", "maximum"):
        if not math.isfinite(getattr(message, bound)):
            raise InvalidField("must be a finite number", field=f"{field}.{bound}")
    if message.HasField("minimum") and message.HasField("maximum") and message.minimum > message.maximum:
        raise InvalidField(
            f"is {format_number(message.maximum)}, below the minimum, {format_number(message.minimum)}",
            field=f"{field}.maximum",
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
