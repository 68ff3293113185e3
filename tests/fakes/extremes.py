"""Messages with one extreme value each, for every field at any depth, by walking descriptors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

LONG = "x" * 20_000
MANY = 1_100
DEPTH_LIMIT = 6
INFINITE = (math.nan, math.inf, -math.inf)
_FLOATS = (*INFINITE, 1.7e308, -1.7e308, 5e-324, -1.0)
_VALUES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
    FieldDescriptor.CPPTYPE_FLOAT: INFINITE,
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), -1, 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), -1, 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (2**32 - 1,),
    FieldDescriptor.CPPTYPE_UINT64: (2**64 - 1,),
    FieldDescriptor.CPPTYPE_BOOL: (True,),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}
_TEXTS = ("", LONG, "\0", "../..", "NaN", "\u2028\U0001f600")


@dataclass(frozen=True)
class Extreme:
    # As in an error's field, such as `worker.step_times[0].mean_s`; relative to the request.
    path: str
    # The field's full name.
    name: str
    value: Any
    message: Message
    # The message that the field is in was in the base already, so that nothing else is wrong with it.
    is_alone: bool

    @property
    def is_infinite(self) -> bool:
        return isinstance(self.value, float) and not math.isfinite(self.value)


@dataclass(frozen=True)
class _Step:
    field: FieldDescriptor
    # The key of a map's entry; empty for others.
    key: str = ""


def extremes(base: Message) -> Iterator[Extreme]:
    """The base with one field changed, for every field and each of its extremes."""
    for steps in _paths(base.DESCRIPTOR, ()):
        last = steps[-1].field
        for value in _values(last):
            message = type(base)()
            message.CopyFrom(base)
            is_alone = _set(message, steps, value)
            yield Extreme(_written(steps), last.full_name, value, message, is_alone)


def _paths(descriptor: Descriptor, steps: tuple[_Step, ...]) -> Iterator[tuple[_Step, ...]]:
    for field in descriptor.fields:
        here = (*steps, _Step(field))
        if field.message_type is None:
            yield here
            continue
        if field.is_repeated and not field.message_type.GetOptions().map_entry:
            # Many empty ones.
            yield here
        if len(here) > DEPTH_LIMIT or sum(step.field.message_type is field.message_type for step in here) > 1:
            continue
        if field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            assert value.message_type is not None, "a map of plain values needs steps of its own"
            yield from _paths(value.message_type, (*steps, _Step(field, key="low")))
        else:
            yield from _paths(field.message_type, here)


def _values(field: FieldDescriptor) -> tuple[Any, ...]:
    if field.message_type is not None:
        return (MANY,)
    if field.type == FieldDescriptor.TYPE_STRING:
        return _TEXTS
    if field.type == FieldDescriptor.TYPE_BYTES:
        return (b"", b"\0" * len(LONG), b"\xff\xfe")
    return _VALUES[field.cpp_type]


def _set(message: Any, steps: tuple[_Step, ...], value: Any) -> bool:
    is_alone = True
    for step in steps[:-1]:
        part = getattr(message, step.field.name)
        if step.key:
            is_alone &= step.key in part
            message = part[step.key]
        elif step.field.is_repeated:
            is_alone &= bool(part)
            message = part[0] if part else part.add()
        else:
            is_alone &= message.HasField(step.field.name)
            part.SetInParent()
            message = part
    field = steps[-1].field
    if field.message_type is not None:
        for _ in range(value):
            getattr(message, field.name).add()
    elif field.is_repeated:
        getattr(message, field.name).extend([value] * MANY if value != LONG else [value] * 3)
    else:
        setattr(message, field.name, value)
    return is_alone


def _written(steps: tuple[_Step, ...]) -> str:
    """Parts of Struct and Value have no names in JSON."""
    names: list[str] = []
    for step in steps:
        if step.field.full_name.startswith("google.protobuf."):
            names += [step.key] if step.key else []
        else:
            is_list = step.field.is_repeated and step.field.message_type is not None
            names.append(f"{step.field.name}[0]" if is_list else step.field.name)
    return ".".join(names)
