"""Keys and values as JetStream takes them: a token of a subject; at most a megabyte, so long values are compressed."""

import zlib

from fanlight.errors import TooLarge

# The server's default `max_payload`, less room for headers.
VALUE_LIMIT_BYTES = 1024 * 1024 - 4096
COMPRESS_FROM_BYTES = 8 * 1024

_PLAIN, _ZLIB = b"\0", b"\1"
_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def token_of(key: str) -> str:
    """The key with every byte that a subject's token cannot hold as `=` and two digits."""
    return "".join(chr(byte) if byte in _SAFE else f"={byte:02x}" for byte in key.encode())


def key_of(token: str) -> str:
    first, *escaped = token.split("=")
    parts = [first.encode(), *(bytes.fromhex(part[:2]) + part[2:].encode() for part in escaped)]
    return b"".join(parts).decode()


def packed(value: bytes) -> bytes:
    """TooLarge when even compressed it is more than the store takes."""
    data = _PLAIN + value if len(value) < COMPRESS_FROM_BYTES else _ZLIB + zlib.compress(value, 1)
    if len(data) > VALUE_LIMIT_BYTES:
        raise TooLarge(f"a record has {len(data)} bytes; the store takes {VALUE_LIMIT_BYTES}")
    return data


def unpacked(data: bytes) -> bytes:
    return zlib.decompress(data[1:]) if data[:1] == _ZLIB else data[1:]
