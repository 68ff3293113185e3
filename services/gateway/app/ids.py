"""Ids that sort by the time they were made: 48 bits of milliseconds, then 80 random bits, in 26 characters (ULID)."""

import re

from services.gateway.app.tokens import RandomBytes

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


_ID = re.compile(f"[{_ALPHABET}]{{26}}")


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def new_id(now_s: float, random_bytes: RandomBytes) -> str:
    value = int(now_s * 1000) << 80 | int.from_bytes(random_bytes(10))
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))
