"""When a call is retried; time passes only where a test lets it."""

import grpc
import grpc.aio
import pytest

from fanlight.client.retry import LONGEST_DELAY_S, Retry
from fanlight.errors import CallFailed

OK = object()


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.slept_s.append(delay_s)
        self.now_s += delay_s


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def retry(time):
    return Retry(connect_s=1.0, clock=time, sleep=time.sleep, jitter=lambda: 1.0)


def failing(*codes: str, takes_s: float = 0.0, time: Time | None = None):
    """Fails with each code in turn, then answers; keeps the seconds it was given."""
    left = list(codes)
    given: list[float] = []

    async def send(left_s: float):
        given.append(left_s)
        if time is not None:
            time.now_s += takes_s
        if not left:
            return OK
        code = getattr(grpc.StatusCode, left.pop(0))
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="no")

    send.given = given
    return send


async def test_the_pause_doubles_up_to_a_limit(retry, time):
    retry.answered = True

    assert await retry.call(failing(*["UNAVAILABLE"] * 7), timeout_s=100) is OK
    assert time.slept_s == [0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_DELAY_S, LONGEST_DELAY_S]


async def test_chance_takes_up_to_half_of_a_pause(time):
    retry = Retry(connect_s=1.0, clock=time, sleep=time.sleep, jitter=lambda: 0.0)

    assert retry.pause_s(0) == pytest.approx(0.1)


async def test_a_gateway_that_never_answered_is_given_up_on_soon(retry, time):
    with pytest.raises(CallFailed):
        await retry.call(failing(*["UNAVAILABLE"] * 9), timeout_s=100)

    assert time.now_s <= 1.0


async def test_a_gateway_that_answered_once_is_waited_for(retry, time):
    await retry.call(failing(), timeout_s=100)

    assert await retry.call(failing(*["UNAVAILABLE"] * 9), timeout_s=100) is OK
    assert time.now_s > 1.0


async def test_no_try_outlasts_the_deadline(retry, time):
    retry.answered = True
    send = failing(*["UNAVAILABLE"] * 9, takes_s=4.0, time=time)

    with pytest.raises(CallFailed):
        await retry.call(send, timeout_s=10)

    assert time.now_s <= 14.0
    assert send.given == pytest.approx([10, 5.8, 1.4])


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"]
)
async def test_what_trying_again_would_not_help_is_not_tried_again(retry, time, code):
    with pytest.raises(CallFailed) as caught:
        await retry.call(failing(code), timeout_s=10)

    assert caught.value.code == code
    assert time.slept_s == []
