"""Finds the text that keeps a protobuf message from being read. Looks at bytes by descriptor, runs after a failure."""

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

_LENGTH_DELIMITED = 2


def broken_text(descriptor: Descriptor, data: bytes) -> str:
    """The path of the first string field that is not UTF-8, such as `generation.prompt`; empty if there is none."""
    try:
        # Iterable by its sequence protocol, which its type stub does not say.
        fields: Any = UnknownFieldSet(Empty.FromString(data))
    except DecodeError:
        return ""
    counts: dict[int, int] = {}
    for found in fields:
        field = descriptor.fields_by_number.get(found.field_number)
        index = counts.get(found.field_number, 0)
        counts[found.field_number] = index + 1
        if field is not None and found.wire_type == _LENGTH_DELIMITED and (path := _within(field, found.data, index)):
            return path
    return ""


def _within(field: FieldDescriptor, data: bytes, index: int) -> str:
    name = f"{field.name}[{index}]" if field.is_repeated else field.name
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            data.decode()
        except UnicodeDecodeError:
            return name
    elif field.message_type is not None and (rest := broken_text(field.message_type, data)):
        return f"{name}.{rest}"
    return ""
