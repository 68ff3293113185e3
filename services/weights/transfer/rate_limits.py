"""When a busy server may be asked again, in every form that hubs and their proxies say it. Pure.

`Retry-After` (RFC 9110), `RateLimit` and `RateLimit-Reset` (drafts of the IETF, old and new), `X-RateLimit-Reset`.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from math import isfinite

# A larger number is a point in time rather than seconds from now; a still larger one is in milliseconds.
FIRST_EPOCH_S = 1e9
FIRST_EPOCH_MS = 1e12
_NUMBER = re.compile(r"\d+(\.\d+)?s?")
_POLICY_PART = re.compile(r"(?:^|[;,\s])(r|t|remaining|reset)\s*=\s*(\d+)")
_RESETS = ("ratelimit-reset", "x-ratelimit-reset-after", "x-ratelimit-reset", "x-rate-limit-reset")
_REMAINING = ("ratelimit-remaining", "x-ratelimit-remaining", "x-rate-limit-remaining")


def wait_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds until the server wants to be asked again; None if it does not say. `now_s`: seconds since 1970.

    `headers` has lower-case names, or ignores case. The most specific header counts.
    """
    for found in (
        _seconds(headers.get("retry-after", ""), now_s),
        _of_policies(headers.get("ratelimit", "")),
        *(_seconds(headers.get(name, ""), now_s) for name in _RESETS),
    ):
        if found is not None:
            return found
    return None


def is_exhausted(headers: Mapping[str, str]) -> bool:
    """Whether the answer says that no request is left: some servers refuse with 403 then."""
    return "retry-after" in headers or any(headers.get(name, "").strip() == "0" for name in _REMAINING)


def _of_policies(text: str) -> float | None:
    """`"api";r=0;t=55`, several of them with commas in between, or `limit=500, remaining=0, reset=55`."""
    waits: list[float] = []
    for policy in [text] if "reset" in text else text.split(","):
        parts = {name[:3]: int(value) for name, value in _POLICY_PART.findall(policy)}
        remaining, reset = parts.get("r", parts.get("rem", 0)), parts.get("t", parts.get("res"))
        if not remaining and reset is not None:
            waits.append(float(reset))
    return max(waits, default=None)


def _seconds(text: str, now_s: float) -> float | None:
    """Seconds, a point in time as seconds or milliseconds since 1970, or a date of HTTP or ISO 8601."""
    text = text.strip().strip('"')
    if _NUMBER.fullmatch(text):
        value = float(text.removesuffix("s"))
        value = value / 1000 if value >= FIRST_EPOCH_MS else value
        found = value - now_s if value >= FIRST_EPOCH_S else value
        return max(0.0, found) if isfinite(found) else None
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_s)
    with suppress(ValueError):
        return max(0.0, datetime.fromisoformat(text).timestamp() - now_s)
    return None
