"""Retries of calls with exponential back-off and jitter, and the error of a failed gRPC call. Knows no service."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from fanlight.backoff import backoff_s
from fanlight.errors import CallFailed

Answer = TypeVar("Answer")

LONGEST_DELAY_S = 5.0


@dataclass(kw_only=True)
class Retry:
    """Retries a call while that may help, never past its deadline.

    Gives up on a gateway that has never answered after `connect_s`; waits until the deadline for one that has, such as
    one that restarts.
    """

    connect_s: float
    answered: bool = False
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random

    async def call(self, send: Callable[[float], Awaitable[Answer]], *, timeout_s: float) -> Answer:
        """`send` gets the seconds that are left. Raises the last try's CallFailed."""
        started_s = self.clock()
        tries = 0
        while True:
            try:
                answer = await send(max(started_s + timeout_s - self.clock(), 0.001))
            except grpc.RpcError as rpc_error:
                error = to_error(rpc_error)
            else:
                self.answered = True
                return answer
            delay_s = self.delay_s(error, tries)
            tries += 1
            give_up_s = timeout_s if self.answered else min(timeout_s, self.connect_s)
            if delay_s is None or self.clock() + delay_s > started_s + give_up_s:
                raise error
            await self.sleep(delay_s)

    def delay_s(self, error: CallFailed, tries: int) -> float | None:
        """How long to wait before sending again after so many tries; None where that would not help."""
        if error.code == "UNAVAILABLE":
            return error.retry_after_s or self.pause_s(tries)
        self.answered = self.answered or error.code != "DEADLINE_EXCEEDED"
        if error.code == "RESOURCE_EXHAUSTED":
            return error.retry_after_s
        return None

    def pause_s(self, tries: int) -> float:
        return backoff_s(tries, longest_s=LONGEST_DELAY_S, chance=self.jitter())


def to_error(error: grpc.RpcError) -> CallFailed:
    """From the google.rpc.Status details where there are any, else from gRPC's own code and text."""
    call = cast(grpc.Call, error)
    code = call.code().name
    status = _status_of(call)
    if status is None:
        return CallFailed(call.details() or code, code=code)
    reason, field, retry_after_s = "", "", None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, field = info.reason, info.metadata.get("field", "")
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return CallFailed(status.message or code, code=code, reason=reason, field=field, retry_after_s=retry_after_s)


def _status_of(call: grpc.Call) -> status_pb2.Status | None:
    """None also where a proxy changed the code and kept the details."""
    try:
        return cast(status_pb2.Status | None, rpc_status.from_call(call))
    except ValueError:
        return None
