"""Signatures of webhooks as Standard Webhooks 1.0 says: HMAC-SHA256 over id, time and body, in base64. Pure."""

import base64
import binascii
import hashlib
import hmac

PREFIX = "whsec_"
KEY_MIN_BYTES, KEY_MAX_BYTES = 24, 64


def key_of(secret: str) -> bytes:
    """ValueError for what is no secret of that scheme."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"must be {PREFIX} and base64") from error
    if not KEY_MIN_BYTES <= len(key) <= KEY_MAX_BYTES:
        raise ValueError(f"must hold {KEY_MIN_BYTES} to {KEY_MAX_BYTES} bytes in base64 after {PREFIX}")
    return key


def signed(key: bytes, *, message_id: str, now_s: int, body: bytes) -> dict[str, str]:
    """The headers that go with the body."""
    content = f"{message_id}.{now_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(now_s), "webhook-signature": f"v1,{signature}"}
