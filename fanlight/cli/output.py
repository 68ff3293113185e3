"""How commands print: JSON, columns, errors. Results go to standard output, everything else to standard error."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fanlight.errors import FanlightError
from fanlight.terminal import printable, printable_json


def print_json(value: object) -> None:
    print(printable_json(json.dumps(value, indent=2, ensure_ascii=False)))


def print_json_line(value: object) -> None:
    print(printable_json(json.dumps(value, ensure_ascii=False)), flush=True)


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, never truncated, so that names can be copied. Control characters are escaped."""
    lines = [list(titles), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_line(text: str) -> None:
    print(printable(text))


def say(text: str) -> None:
    """A line on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def print_warnings(sentences: Sequence[str]) -> None:
    """On standard error, one line each."""
    for sentence in sentences:
        say(f"warning: {' '.join(sentence.split())}")


def print_error(error: FanlightError, *, as_json: bool) -> None:
    if as_json:
        print_json({"error": error.as_dict()})
    else:
        say(f"error: {error.message}")


def to_dict(message: Message) -> dict[str, Any]:
    """The protos' field names, as in the HTTP API, but 64-bit integers as numbers and without bytes fields."""
    from google.protobuf.json_format import MessageToDict

    converted = MessageToDict(message, preserving_proto_field_name=True)
    for field, value in message.ListFields():
        if field.name in converted:
            converted[field.name] = _plain(field, value, converted[field.name])
    return {name: value for name, value in converted.items() if value is not _DROPPED}


_DROPPED = object()


def _plain(field: FieldDescriptor, value: Any, converted: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _DROPPED
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
        return list(value) if isinstance(converted, list) else int(value)
    nested = field.message_type
    if nested is None or nested.full_name.startswith("google."):
        return converted
    return [to_dict(each) for each in value] if isinstance(converted, list) else to_dict(value)
