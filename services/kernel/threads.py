"""Blocking work on threads, for callers on an event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(executor: Executor, work: Callable[[], T], *, on_cancel: Callable[[], None] = lambda: None) -> T:
    """Who is cancelled goes on only when the work has ended, or never begins: until then it needs what it was given.

    `on_cancel` is called first then, and may hasten that. How work ends that nobody waits for is told to nobody.
    """
    job = executor.submit(work)
    working = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        on_cancel()
        if not job.cancel():
            await asyncio.wait([working])
            working.exception()  # lest asyncio complain that nobody asked for it
        raise
