"""Blobs by digest, from any place that hands them out, and the JSON in them."""

import hashlib
import json
from contextlib import AbstractContextManager
from http.client import HTTPException
from typing import Any, BinaryIO, Protocol

from .model import AuditError
from .streams import hash_of

MANIFEST_BYTES_MAX = 16 << 20


class Blobs(Protocol):
    """Where an image's blobs are."""

    def open(self, digest: str) -> AbstractContextManager[BinaryIO]: ...


def read_json(blobs: Blobs, digest: str, what: str) -> dict[str, Any]:
    """The JSON object that the digest names. FileNotFoundError where it is missing, AuditError where it is none."""
    try:
        with blobs.open(digest) as source:
            body = source.read(MANIFEST_BYTES_MAX)
    except FileNotFoundError:
        raise
    except (OSError, HTTPException) as error:
        raise AuditError(f"{what} {digest[:19]} cannot be read: {error}") from error
    if f"{hash_of(digest)}:{hashlib.new(hash_of(digest), body).hexdigest()}" != digest:
        raise AuditError(f"{what} {digest[:19]} is not what its digest says")
    try:
        found = json.loads(body)
    except ValueError as error:
        raise AuditError(f"{what} {digest[:19]} is no JSON") from error
    if not isinstance(found, dict):
        raise AuditError(f"{what} {digest[:19]} is no JSON object")
    return found


def required_json(blobs: Blobs, digest: str, what: str) -> dict[str, Any]:
    """As `read_json`; AuditError also where it is missing."""
    try:
        return read_json(blobs, digest, what)
    except FileNotFoundError as error:
        raise AuditError(f"{what} {digest[:19]} is missing") from error
