"""Lease tokens. Whoever gets one back reads from it which task it was for; workers do not look inside."""

from collections.abc import Callable

from fanlight.errors import LeaseLost
from services.gateway.ordering.tasks import Key

SECRET_BYTES = 16

RandomBytes = Callable[[int], bytes]


def new_token(key: Key, random_bytes: RandomBytes) -> str:
    return f"{key[0]}.{key[1]}.{random_bytes(SECRET_BYTES).hex()}"


def key_of(token: str) -> Key:
    """LeaseLost for what was never a token of ours."""
    job_id, _, rest = token.partition(".")
    number, _, secret = rest.partition(".")
    if not (job_id and number.isdecimal() and len(number) < 4 and secret):
        raise LeaseLost("this is no lease token; drop the work")
    return job_id, int(number)
