"""JSON values to protobuf messages and back, by the names of the protos. Errors name the field's whole path."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import any_pb2, descriptor_pool
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.responses import Response

from fanlight.errors import InvalidField

# Its two implementations have no type in common.
Field = Any

# Messages with a JSON form of their own.
_WELL_KNOWN = "google.protobuf."
# A message that names its own type, by its full name behind the last slash.
_ANY, _TYPE = "google.protobuf.Any", "@type"
# Of a value inside a field, such as a parameter; protobuf cannot read what is far deeper.
DEPTH_LIMIT = 24
# How many fields an error suggests instead of an unknown one.
NEAR_LIMIT = 3

_KINDS = {
    FieldDescriptor.CPPTYPE_INT32: "a whole number from -2147483648 to 2147483647",
    FieldDescriptor.CPPTYPE_INT64: "a whole number",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number from 0 to 4294967295",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number from 0 to 18446744073709551615",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "a string",
    FieldDescriptor.CPPTYPE_MESSAGE: "an object",
}


def fill(message: Message, value: object, *, path: str = "") -> None:
    """Set the message's fields from a JSON object. InvalidField for an unknown field or a wrong value."""
    if not isinstance(value, Mapping):
        raise InvalidField("must be an object", field=path or "body")
    fields = {name: field for field in message.DESCRIPTOR.fields for name in (field.name, field.json_name)}
    given: dict[int, str] = {}
    for name, part in value.items():
        where = f"{path}.{name}" if path else name
        field = fields.get(name)
        if field is None:
            raise InvalidField(f"is not known; {_near(name, message)}", field=where)
        if given.setdefault(field.number, name) != name:
            raise InvalidField(f"is given twice, also as {given[field.number]}", field=where)
        if part is not None:
            _refuse_second(message, field, where)
            _fill_field(message, field, part, where)


def _near(name: str, message: Message) -> str:
    """Similar field names; all names if no name is similar."""
    known = [each.name for each in message.DESCRIPTOR.fields]
    near = difflib.get_close_matches(str(name).lower(), known, n=NEAR_LIMIT)
    return f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(known)}"


def _refuse_second(message: Message, field: Field, where: str) -> None:
    oneof = field.containing_oneof
    other = message.WhichOneof(oneof.name) if oneof is not None else None
    if other is not None:
        raise InvalidField(f"does not go together with {other}", field=where)


def _refuse_deep(value: object, where: str) -> None:
    level = [value]
    for _ in range(DEPTH_LIMIT + 1):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return
    raise InvalidField(f"is nested more than {DEPTH_LIMIT} levels deep", field=where)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _fill_field(message: Message, field: Field, value: object, where: str) -> None:
    kind = field.message_type
    if kind is not None and kind.full_name.startswith(_WELL_KNOWN):
        _refuse_deep(value, where)
    if kind is not None and kind.full_name == _ANY:
        _fill_any(getattr(message, field.name), value, where)
        return
    part = getattr(message, field.name)
    if kind is None or kind.full_name.startswith(_WELL_KNOWN):
        if hasattr(part, "append"):
            _fill_list(message, field, value, where)
        else:
            _fill_leaf(message, field, value, where)
    elif isinstance(part, Message):
        part.SetInParent()
        fill(part, value, path=where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            fill(part.add(), item, path=f"{where}[{index}]")
    else:
        raise InvalidField("must be a list", field=where)


def _fill_any(packed: any_pb2.Any, value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        raise InvalidField("must be an object", field=where)
    message = _of_type(value.get(_TYPE), f"{where}.{_TYPE}")
    parts = {name: part for name, part in value.items() if name != _TYPE}
    if message.DESCRIPTOR.full_name.startswith(_WELL_KNOWN):
        try:
            ParseDict(dict(value), packed)
        except (ParseError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise InvalidField(f"must be a {message.DESCRIPTOR.full_name}", field=where) from error
    else:
        fill(message, parts, path=where)
        packed.Pack(message)


def _of_type(name: object, where: str) -> Message:
    """An empty message of that type. InvalidField for an unknown type."""
    if not isinstance(name, str) or "/" not in name:
        raise InvalidField("must name the message: type.googleapis.com/ and its full name", field=where)
    try:
        return GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name.rpartition("/")[2]))()
    except (KeyError, UnicodeEncodeError) as error:
        raise InvalidField(f"is not a message that this gateway knows: {name[:80]!r}", field=where) from error


def _fill_list(message: Message, field: Field, value: object, where: str) -> None:
    if not isinstance(value, list):
        raise InvalidField("must be a list", field=where)
    for index, item in enumerate(value):
        # Parsing a list replaces what a message has of it.
        one = type(message)()
        _fill_leaf(one, field, [item], f"{where}[{index}]")
        message.MergeFrom(one)


def _fill_leaf(message: Message, field: Field, value: object, where: str) -> None:
    try:
        ParseDict({field.name: value}, message)
    except (ParseError, ValueError, TypeError, RecursionError) as error:
        raise InvalidField(f"must be {_kind(field)}", field=where) from error


def _kind(field: Field) -> str:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return "base64"
    if field.enum_type is not None:
        return f"one of {', '.join(value.name for value in field.enum_type.values)}"
    return _KINDS[field.cpp_type]


def to_json(message: Message) -> dict[str, Any]:
    """proto3's JSON mapping with the protos' names: 64-bit numbers are strings, bytes are base64.

    Every field is present, even an empty list; only messages and `optional` fields that are unset are left out.
    """
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def answer(message: Message, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return of_value(to_json(message), status=status, headers=headers)


def of_value(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(text(value), status_code=status, media_type="application/json", headers=dict(headers or {}))


def text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
