"""Reads a FileDescriptorSet from standard input and prints its comments as JSON.

`make protos` writes them beside the stubs, so that the HTTP API's documentation has the protos' comments.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

# Field numbers of descriptor.proto, which the paths of comments consist of.
MESSAGES, FIELDS, NESTED = 4, 2, 3


def words_of(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """Full name and comment of each message and field that has one."""
    comments = {tuple(each.path): " ".join(each.leading_comments.split()) for each in file.source_code_info.location}

    def of_message(message: Any, name: str, path: tuple[int, ...]) -> Iterator[tuple[str, str]]:
        yield name, comments.get(path, "")
        for number, field in enumerate(message.field):
            yield f"{name}.{field.name}", comments.get((*path, FIELDS, number), "")
        for number, nested in enumerate(message.nested_type):
            yield from of_message(nested, f"{name}.{nested.name}", (*path, NESTED, number))

    for number, message in enumerate(file.message_type):
        yield from of_message(message, f"{file.package}.{message.name}", (MESSAGES, number))


def main() -> None:
    files = FileDescriptorSet.FromString(sys.stdin.buffer.read()).file
    found = dict(sorted((name, text) for file in files for name, text in words_of(file) if text))
    print(json.dumps(found, indent=0, ensure_ascii=False))


if __name__ == "__main__":
    main()
