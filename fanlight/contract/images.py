"""Finds the images of a request, at any depth. Fetches nothing and decodes no image: their bytes are opaque.

A path such as `image` or `controls[0].image` is the place of an image in a message.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import unquote_to_bytes

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from fanlight.common.v1.common_pb2 import ImageSource
from fanlight.contract.names import parse_digest, parse_scope
from fanlight.errors import InvalidField

_SCHEME = "data:"
_STEP = re.compile(r"([a-z][a-z0-9_]*)(?:\[(\d{1,4})\])?")
_IMAGE = ImageSource.DESCRIPTOR.full_name


def images_of(message: Message) -> Iterator[tuple[str, ImageSource]]:
    """Every image that is set, with its path, in the order of field numbers. The messages themselves, not copies.

    Searches nested and repeated messages, but no Any and no map.
    """
    for field, value in message.ListFields():
        if not _may_hold_images(field):
            continue
        if isinstance(value, Message):
            yield from _images_at(field.name, value)
        else:
            for index, each in enumerate(value):
                yield from _images_at(f"{field.name}[{index}]", each)


def _images_at(path: str, message: Message) -> Iterator[tuple[str, ImageSource]]:
    if isinstance(message, ImageSource):
        yield path, message
    else:
        yield from ((f"{path}.{rest}", image) for rest, image in images_of(message))


def _may_hold_images(field: FieldDescriptor) -> bool:
    nested = field.message_type
    return nested is not None and not nested.GetOptions().map_entry and _holds_images(nested)


@cache
def _holds_images(descriptor: Descriptor) -> bool:
    """Whether it is an image, or some message below it is one, however deep."""
    seen, waiting = {descriptor.full_name}, [descriptor]
    while waiting:
        each = waiting.pop()
        if each.full_name == _IMAGE:
            return True
        nested = [field.message_type for field in each.fields if field.message_type is not None]
        waiting += [below for below in nested if below.full_name not in seen]
        seen |= {below.full_name for below in nested}
    return False


def image_at(message: Message, path: str) -> ImageSource:
    """The image at a path, set (and empty) if it was absent. InvalidField about the path where it leads to no image."""
    found: Any = message
    for step in path.split("."):
        found = _step(found, step, message, path)
    if not isinstance(found, ImageSource):
        raise _no_image(message, path)
    found.SetInParent()
    return found


def _step(found: Any, step: str, message: Message, path: str) -> Any:
    match = _STEP.fullmatch(step)
    field = found.DESCRIPTOR.fields_by_name.get(match[1]) if match else None
    if match is None or field is None or not _may_hold_images(field):
        raise _no_image(message, path)
    value, index = getattr(found, field.name), match[2]
    if isinstance(value, Message) and index is None:
        return value
    if isinstance(value, Message) or index is None or int(index) >= len(value):
        raise _no_image(message, path)
    return value[int(index)]


def _no_image(message: Message, path: str) -> InvalidField:
    return InvalidField(f"leads to no image of {message.DESCRIPTOR.full_name}", field=path)


def check_source(source: ImageSource, field: str) -> None:
    """InvalidField, at or below the field, unless it has bytes, the digest of a blob, or a `data:` URL with bytes."""
    if source.WhichOneof("source") == "blob":
        parse_scope(source.blob.scope, field=f"{field}.blob.scope")
        parse_digest(source.blob.digest, field=f"{field}.blob.digest")
    else:
        data_of(source, field)


def data_of(source: ImageSource, field: str) -> bytes:
    """The bytes in the request, as `data` or in a `data:` URL. InvalidField, at or below the field, for none."""
    match source.WhichOneof("source"):
        case "data":
            data = source.data
        case "url":
            data = _decoded(source.url, f"{field}.url")
        case "blob":
            raise InvalidField("is a blob; its bytes are not in the request", field=field)
        case _:
            raise InvalidField("is missing: give its bytes as data, a blob written before, or a data: URL", field=field)
    if not data:
        raise InvalidField("has no bytes", field=field)
    return data


def _decoded(url: str, field: str) -> bytes:
    """The bytes in a URL of RFC 2397."""
    if url[: len(_SCHEME)].lower() != _SCHEME:
        raise InvalidField("must be a data: URL; nothing is fetched from the network", field=field)
    head, comma, body = url[len(_SCHEME) :].partition(",")
    if not comma:
        raise InvalidField("must have a comma before its data", field=field)
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise InvalidField("has data that is not base64", field=field) from error
