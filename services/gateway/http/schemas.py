"""JSON schemas of protobuf messages, as proto3's JSON mapping writes them. Knows descriptors and no message of ours."""

from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

Schema = dict[str, Any]
# Its two implementations have no type in common.
Descriptor = Any
# What is said of a message, by its full name, or of one of its fields; empty where nothing is.
Words = Callable[[str, str], str]

_SCALARS: dict[int, Schema] = {
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1},
    # Texts, because JavaScript's numbers end at 2 to the 53rd. Numbers are taken too.
    FieldDescriptor.CPPTYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.CPPTYPE_UINT64: {"type": "string", "format": "uint64"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
}
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
    "google.protobuf.Value": {"description": "Any JSON value."},
    "google.protobuf.Any": {
        "type": "object",
        "properties": {"@type": {"type": "string"}},
        "required": ["@type"],
        "additionalProperties": True,
    },
}


def reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def schemas_of(messages: Iterable[type[Message]], words: Words) -> dict[str, Schema]:
    """The schemas of the messages and of all that they contain, by the messages' short names."""
    found: dict[str, Descriptor] = {}
    waiting: list[Descriptor] = [message.DESCRIPTOR for message in messages]
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name in _WELL_KNOWN:
            continue
        if descriptor.name in found:
            assert found[descriptor.name].full_name == descriptor.full_name, f"two are named {descriptor.name}"
            continue
        found[descriptor.name] = descriptor
        waiting += [field.message_type for field in descriptor.fields if field.message_type is not None]
    return {name: _of_message(found[name], words) for name in sorted(found)}


def _of_message(descriptor: Descriptor, words: Words) -> Schema:
    empty = GetMessageClass(descriptor)()
    properties = {
        field.name: _said(words(descriptor.full_name, field.name), _of_field(empty, field))
        for field in descriptor.fields
    }
    schema: Schema = {"type": "object", "title": descriptor.name, "properties": properties}
    schema["additionalProperties"] = False
    choices = [
        f"At most one of {', '.join(f'`{field.name}`' for field in oneof.fields)}."
        for oneof in descriptor.oneofs
        if len(oneof.fields) > 1
    ]
    return _said(" ".join([words(descriptor.full_name, ""), *choices]).strip(), schema)


def _said(text: str, schema: Schema) -> Schema:
    """With the text before what the schema says already."""
    whole = " ".join(filter(None, [text, schema.get("description", "")]))
    return schema | ({"description": whole} if whole else {})


def _of_field(empty: Message, field: Descriptor) -> Schema:
    one = _of_one(field)
    # Only repeated fields have values that can be extended.
    return {"type": "array", "items": one} if hasattr(getattr(empty, field.name), "extend") else one


def _of_one(field: Descriptor) -> Schema:
    if field.message_type is not None:
        name = field.message_type.full_name
        return dict(_WELL_KNOWN[name]) if name in _WELL_KNOWN else reference(field.message_type.name)
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "format": "byte", "description": "Base64."}
    return dict(_SCALARS.get(field.cpp_type, {"type": "string"}))
