"""Digests: `sha256:` and 64 lower-case hexadecimal digits; scopes: whose bytes they are."""

import hashlib
import re

from fanlight.errors import InvalidField

DEFAULT_SCOPE = "default"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SCOPE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def digest_of(data: bytes) -> str:
    return named(hashlib.sha256(data).hexdigest())


def named(hexdigest: str) -> str:
    return f"sha256:{hexdigest}"


def parse_digest(text: str, *, field: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise InvalidField("must be sha256: and 64 lower-case hexadecimal digits", field=field)
    return text


def parse_scope(text: str, *, field: str) -> str:
    """The scope's name; an empty one is the default."""
    if not text:
        return DEFAULT_SCOPE
    if not _SCOPE.fullmatch(text):
        raise InvalidField("must be 1 to 63 of a-z, 0-9 and -, not starting with -", field=field)
    return text
