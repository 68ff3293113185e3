"""Refuses numbers that are not finite, in any message and at any depth: no record keeps them and JSON has none.

Knows no field by its meaning, except that measurements are best effort: who reads one takes what is impossible for
unknown, because a worker's broken clock must not cost a finished task.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from fanlight.errors import InvalidField

# Full names of fields that a worker measures. They are not refused.
MEASUREMENTS = frozenset(
    {
        "fanlight.common.v1.FetchProgress.goodput_bps",
        "fanlight.common.v1.FetchProgress.seconds_left",
        "fanlight.common.v1.Span.duration_s",
        "fanlight.queue.v1.StepTime.deviation_s",
        "fanlight.queue.v1.StepTime.mean_s",
        "fanlight.queue.v1.Worker.goodput_bps",
        "fanlight.queue.v1.Worker.goodput_deviation_bps",
    }
)
# Requests that are refused when they are read, each of a batch by itself, with the range that their field has.
_REFUSED_LATER = frozenset(
    {
        "fanlight.diffusion.v1.GenerateRequest",
        "fanlight.gateway.v1.CreateJobRequest",
        "fanlight.gateway.v1.CreateJobsRequest",
        "fanlight.preprocessor.v1.AnnotateManyRequest",
        "fanlight.preprocessor.v1.AnnotateRequest",
    }
)
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
# The path of the first bad number in a field's value, relative to the message, such as `loras[0].weight`; else None.
Search = Callable[[Message], str | None]


def refuse_at_edge(request: Message) -> None:
    """Of every call, before anything reads it: as `refuse_not_finite`, but for requests that the contract checks."""
    if request.DESCRIPTOR.full_name not in _REFUSED_LATER:
        refuse_not_finite(request)


def refuse_not_finite(message: Message) -> None:
    """InvalidField names the first number that is NaN or infinite, such as `generation.loras[0].weight`."""
    path = _first(message)
    if path is not None:
        raise InvalidField("is not a finite number", field=path)


def _first(message: Message) -> str | None:
    for search in _searches(message.DESCRIPTOR):
        path = search(message)
        if path is not None:
            return path
    return None


@cache
def _searches(descriptor: Descriptor) -> tuple[Search, ...]:
    """One for each field that can hold such a number; none for most messages, which makes them cheap."""
    special = {Struct.DESCRIPTOR: _in_struct, Value.DESCRIPTOR: _in_value, ListValue.DESCRIPTOR: _in_list}
    if descriptor in special:
        return (special[descriptor],)
    if descriptor is AnyMessage.DESCRIPTOR:
        return (_in_any,)
    return tuple(_search_of(field) for field in descriptor.fields if _may_hold(field))


def _may_hold(field: FieldDescriptor) -> bool:
    if field.full_name in MEASUREMENTS:
        return False
    return field.cpp_type in _FLOATS or (field.message_type is not None and _reaches_number(field.message_type))


@cache
def _reaches_number(descriptor: Descriptor) -> bool:
    """Whether some message below it, however deep, has such a field."""
    seen, waiting = {descriptor.full_name}, [descriptor]
    while waiting:
        each = waiting.pop()
        if each is AnyMessage.DESCRIPTOR:
            return True
        for field in each.fields:
            if field.full_name in MEASUREMENTS:
                continue
            if field.cpp_type in _FLOATS:
                return True
            if field.message_type is not None and field.message_type.full_name not in seen:
                seen.add(field.message_type.full_name)
                waiting.append(field.message_type)
    return False


def _search_of(field: FieldDescriptor) -> Search:
    name, is_number = field.name, field.cpp_type in _FLOATS
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _map_search(name, field.message_type.fields_by_name["value"])

    def number(message: Message) -> str | None:
        return None if math.isfinite(getattr(message, name)) else name

    def numbers(message: Message) -> str | None:
        return next((f"{name}[{i}]" for i, each in enumerate(getattr(message, name)) if not math.isfinite(each)), None)

    def part(message: Message) -> str | None:
        return _under(name, _first(getattr(message, name))) if message.HasField(name) else None

    def parts(message: Message) -> str | None:
        for i, each in enumerate(getattr(message, name)):
            if (path := _first(each)) is not None:
                return _under(f"{name}[{i}]", path)
        return None

    if field.is_repeated:
        return numbers if is_number else parts
    return number if is_number else part


def _map_search(name: str, value: FieldDescriptor) -> Search:
    def entries(message: Message) -> str | None:
        for key, each in getattr(message, name).items():
            path = _first(each) if value.message_type is not None else _number_path(each)
            if path is not None:
                return _under(f"{name}.{key}", path)
        return None

    return entries


def _number_path(number: float) -> str | None:
    return None if math.isfinite(number) else ""


def _under(name: str, path: str | None) -> str | None:
    if path is None:
        return None
    return f"{name}.{path}" if path and not path.startswith("[") else f"{name}{path}"


# What proto3's JSON mapping writes as JSON itself is named as in that JSON: `parameters.sizes[0]`.


def _in_struct(message: Any) -> str | None:
    for key, value in message.fields.items():
        if (path := _in_value(value)) is not None:
            return _under(key, path)
    return None


def _in_list(message: Any) -> str | None:
    for i, value in enumerate(message.values):
        if (path := _in_value(value)) is not None:
            return _under(f"[{i}]", path)
    return None


def _in_value(message: Any) -> str | None:
    kind = message.WhichOneof("kind")
    if kind == "number_value":
        return _number_path(message.number_value)
    if kind == "struct_value":
        return _in_struct(message.struct_value)
    return _in_list(message.list_value) if kind == "list_value" else None


def _in_any(message: Any) -> str | None:
    """Of a message of an unknown type, or one that cannot be read, nothing is known; its reader refuses it."""
    try:
        packed = GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(message.TypeName()))
        return _first(packed.FromString(message.value)) if _searches(packed.DESCRIPTOR) else None
    except (KeyError, DecodeError):
        return None
