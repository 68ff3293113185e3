"""Trying again: how long between tries, how long in all, and when not at all."""

from collections.abc import Callable

import pytest

from fanlight.errors import FanlightError, InvalidField, LeaseLost, NotFound, ResourceExhausted, Unavailable
from services.worker.goodput import MEASURED_BYTES_MIN, Goodput
from services.worker.patience import Backoff, Patience
from services.worker.surroundings import Surroundings


class Time:
    """Time that passes only in pauses."""

    def __init__(self, *, random: Callable[[], float] = lambda: 0.0) -> None:
        self.now_s = 0.0
        self.surroundings = Surroundings(now_s=lambda: self.now_s, pause=self.pause, random=random)

    async def pause(self, duration_s: float) -> None:
        self.now_s += duration_s


def failing(*errors: FanlightError) -> Callable[[], object]:
    left = list(errors)

    async def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def test_pauses_double_up_to_the_longest() -> None:
    backoff = Backoff(Time(random=lambda: 1.0).surroundings, max_s=1.0)
    assert [round(backoff.next_s(), 2) for _ in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    backoff.reset()
    assert backoff.next_s() == pytest.approx(0.2)


def test_chance_shortens_a_pause_by_half_at_most() -> None:
    shortest, longest = (Backoff(Time(random=lambda r=r: r).surroundings, max_s=1.0).next_s() for r in (0.0, 1.0))
    assert (shortest, longest) == (pytest.approx(0.1), pytest.approx(0.2))


def test_a_pause_is_at_least_what_the_error_asks_for() -> None:
    backoff = Backoff(Time().surroundings, max_s=1.0)
    assert backoff.next_s(ResourceExhausted("later", retry_after_s=7.0)) == 7.0


async def test_what_may_pass_is_tried_again() -> None:
    patience = Patience(Time().surroundings, delay_max_s=1.0, limit_s=60.0)
    attempt = failing(Unavailable("down"), ResourceExhausted("full"), Unavailable("down"))
    assert await patience.insist(attempt, doing="test") == "done"


@pytest.mark.parametrize("error", [InvalidField("wrong", field="a"), NotFound("no such blob"), LeaseLost("gone")])
async def test_what_cannot_pass_is_not_tried_again(error: FanlightError) -> None:
    patience = Patience(Time().surroundings, delay_max_s=1.0, limit_s=60.0)
    with pytest.raises(type(error)):
        await patience.insist(failing(error), doing="test")


async def test_patience_ends_at_its_limit() -> None:
    time = Time()
    patience = Patience(time.surroundings, delay_max_s=1.0, limit_s=10.0)
    with pytest.raises(Unavailable):
        await patience.insist(failing(*[Unavailable("down")] * 1_000), doing="test")
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
