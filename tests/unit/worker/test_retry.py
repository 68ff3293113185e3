"""Retries: how long to pause between attempts, how long to retry in all, and which errors are not retried."""

from collections.abc import Callable

import pytest

from fanlight.errors import FanlightError, InvalidField, LeaseLost, NotFound, ResourceExhausted, Unavailable
from services.worker.blobs import MEASURED_BYTES_MIN, Goodput
from services.worker.retry import Backoff, Env, RetryPolicy, Throttle


class Time:
    """Time that passes only while something sleeps."""

    def __init__(self, *, random: Callable[[], float] = lambda: 0.0) -> None:
        self.now_s = 0.0
        self.env = Env(now_s=lambda: self.now_s, sleep=self.sleep, random=random)

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def failing(*errors: FanlightError) -> Callable[[], object]:
    left = list(errors)

    async def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def test_back_off_doubles_up_to_the_longest_pause() -> None:
    backoff = Backoff(Time(random=lambda: 1.0).env, max_s=1.0)
    assert [round(backoff.next_s(), 2) for _ in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    backoff.reset()
    assert backoff.next_s() == pytest.approx(0.2)


def test_chance_shortens_a_pause_by_half_at_most() -> None:
    shortest, longest = (Backoff(Time(random=lambda r=r: r).env, max_s=1.0).next_s() for r in (0.0, 1.0))
    assert (shortest, longest) == (pytest.approx(0.1), pytest.approx(0.2))


def test_a_pause_is_at_least_what_the_error_asks_for() -> None:
    backoff = Backoff(Time().env, max_s=1.0)
    assert backoff.next_s(ResourceExhausted("later", retry_after_s=7.0)) == 7.0


async def test_a_retryable_error_is_retried() -> None:
    retry = RetryPolicy(Time().env, delay_max_s=1.0, limit_s=60.0)
    attempt = failing(Unavailable("down"), ResourceExhausted("full"), Unavailable("down"))
    assert await retry.call(attempt, doing="test") == "done"


@pytest.mark.parametrize("error", [InvalidField("wrong", field="a"), NotFound("no such blob"), LeaseLost("gone")])
async def test_a_final_error_is_not_retried(error: FanlightError) -> None:
    retry = RetryPolicy(Time().env, delay_max_s=1.0, limit_s=60.0)
    with pytest.raises(type(error)):
        await retry.call(failing(error), doing="test")


async def test_retries_end_at_the_limit() -> None:
    time = Time()
    retry = RetryPolicy(time.env, delay_max_s=1.0, limit_s=10.0)
    with pytest.raises(Unavailable):
        await retry.call(failing(*[Unavailable("down")] * 1_000), doing="test")
    assert 8.0 < time.now_s <= 10.0


def test_goodput_follows_the_link_and_ignores_small_pieces() -> None:
    goodput = Goodput()
    goodput.note(MEASURED_BYTES_MIN - 1, 1.0)
    assert goodput.bps == 0
    goodput.note(1_000_000, 1.0)
    assert goodput.bps == 8_000_000
    for _ in range(30):
        goodput.note(1_000_000, 0.5)
    assert goodput.bps == pytest.approx(16_000_000, rel=0.01)


def test_a_line_is_written_again_when_it_differs_or_after_a_while() -> None:
    now_s = 0.0
    throttle = Throttle(Env(now_s=lambda: now_s), every_s=60.0)
    assert [throttle.allows(key) for key in ("a", "a", "b", "b", "a")] == [True, False, True, False, True]
    now_s = 59.0
    assert not throttle.allows("a")
    now_s = 60.0
    assert throttle.allows("a")
    throttle.reset()
    assert throttle.allows("a")
