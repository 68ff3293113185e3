"""How many bytes a day has had, for the cap that all processes of a store share."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime

from services.weights.errors import DailyCapReached
from services.weights.index import Index

COUNT_STEP_BYTES = 4 * 1024 * 1024
DAY_S = 86_400


class Traffic:
    """Bytes of the day, counted in steps so that the index is not written for every block."""

    def __init__(self, index: Index, io: Executor, daily_bytes: int, wall_s: Callable[[], float]) -> None:
        self._index = index
        self._io = io
        self._daily_bytes = daily_bytes
        self._wall_s = wall_s
        self._uncounted = 0

    async def count(self, size_bytes: int) -> None:
        self._uncounted += size_bytes
        step = min(COUNT_STEP_BYTES, self._daily_bytes // 64) if self._daily_bytes else COUNT_STEP_BYTES
        if self._uncounted >= step:
            total = await self.flush()
            if self._daily_bytes and total >= self._daily_bytes:
                left_s = DAY_S - self._wall_s() % DAY_S
                raise DailyCapReached(
                    f"{total} bytes were fetched today; the cap is {self._daily_bytes}", retry_after_s=left_s
                )

    async def flush(self) -> int:
        count, self._uncounted = self._uncounted, 0
        day = datetime.fromtimestamp(self._wall_s(), UTC).date().isoformat()
        return await asyncio.get_running_loop().run_in_executor(self._io, self._index.add_traffic, day, count)
