"""Time, chance and races, passed in so that tests decide them."""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


def _new_id() -> str:
    return secrets.token_hex(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    now_s: Callable[[], float] = time.monotonic
    pause: Callable[[float], Coroutine[Any, Any, None]] = asyncio.sleep
    # From 0 up to 1.
    random: Callable[[], float] = random.random
    new_id: Callable[[], str] = _new_id


async def unless(work: Coroutine[Any, Any, Result], *interrupts: Coroutine[Any, Any, object]) -> Result | None:
    """The work's result, or None when an interrupt came first. What has not ended by then is cancelled."""
    working = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [working, *(asyncio.create_task(each) for each in interrupts)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
