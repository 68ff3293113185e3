"""When a busy server may be asked again, in the forms that hubs say it."""

import httpx
import pytest

from services.weights.transfer.rate_limits import is_exhausted, wait_s

# 2026-01-01T12:00:00Z
NOW_S = 1_767_268_800.0


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ({}, None),
        ({"Retry-After": "37"}, 37.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "Thu, 01 Jan 2026 12:00:20 GMT"}, 20.0),
        ({"Retry-After": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": "api; r=0; t=55"}, 55.0),
        ({"RateLimit": '"api";r=0;t=55, "day";r=12;t=4000'}, 55.0),
        ({"RateLimit": '"api";r=0;t=55, "resolvers";r=0;t=70'}, 70.0),
        ({"RateLimit": "limit=500, remaining=0, reset=40"}, 40.0),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit-Reset": "30"}, 30.0),
        ({"X-RateLimit-Reset": str(int(NOW_S) + 25)}, 25.0),
        ({"X-RateLimit-Reset": str(int(NOW_S + 25) * 1000)}, 25.0),
        ({"X-RateLimit-Reset": "12"}, 12.0),
        ({"X-RateLimit-Reset": "2026-01-01T12:00:10+00:00"}, 10.0),
        ({"X-RateLimit-Reset-After": "2.5"}, 2.5),
        ({"Retry-After": "3", "RateLimit": '"api";r=0;t=55'}, 3.0),
    ],
)
def test_the_wait_that_a_server_asks_for(headers, expected_s):
    assert wait_s(httpx.Headers(headers), NOW_S) == expected_s


def test_a_refusal_for_want_of_requests_is_told_from_others():
    assert is_exhausted(httpx.Headers({"X-RateLimit-Remaining": "0"}))
    assert is_exhausted(httpx.Headers({"Retry-After": "9"}))
    assert not is_exhausted(httpx.Headers({"X-RateLimit-Remaining": "12"}))
