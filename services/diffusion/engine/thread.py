"""The one thread that owns the device."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class DeviceThread:
    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def attempt(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """The ended future of `work` done on the thread: an error is in it, not raised."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        await asyncio.wait([future])
        return future

    def close(self) -> None:
        """Takes no more work, and does not wait for what is at hand: an import of torch may take a minute."""
        self._executor.shutdown(wait=False, cancel_futures=True)
