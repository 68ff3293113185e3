"""A picture of a request: bytes, a digest or a `data:` URL. Nothing is fetched from the network."""

import base64
import binascii
from urllib.parse import unquote_to_bytes

from fanlight.common.v1 import common_pb2
from services.gateway.app.new_job import Picture
from services.kernel.digests import parse_digest, parse_scope
from services.kernel.errors import InvalidField

SCHEME = "data:"


def picture(message: common_pb2.Picture, *, field: str) -> Picture:
    match message.WhichOneof("source"):
        case "data":
            return _of_bytes(message.data, field)
        case "url":
            return _of_bytes(_decoded(message.url, f"{field}.url"), field)
        case "blob":
            return Picture(
                field=field,
                scope=parse_scope(message.blob.scope, field=f"{field}.blob.scope"),
                digest=parse_digest(message.blob.digest, field=f"{field}.blob.digest"),
            )
    raise InvalidField("is missing: give its bytes as data, a blob written before, or a data: URL", field=field)


def _of_bytes(data: bytes, field: str) -> Picture:
    if not data:
        raise InvalidField("has no bytes", field=field)
    return Picture(field=field, data=data)


def _decoded(url: str, field: str) -> bytes:
    """The bytes in a URL of RFC 2397."""
    if not url[: len(SCHEME)].lower() == SCHEME:
        raise InvalidField("must be a data: URL; nothing is fetched from the network", field=field)
    head, comma, body = url[len(SCHEME) :].partition(",")
    if not comma:
        raise InvalidField("must have a comma before its data", field=field)
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise InvalidField("has data that is not base64", field=field) from error
