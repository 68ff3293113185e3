"""How fast and how much may be downloaded, and how often it is retried. Clocks, sleep and randomness are passed in.

Token buckets cap the link across processes, a daily cap the bytes; retries use exponential back-off.
"""

import asyncio
import fcntl
import os
import random
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fanlight.backoff import backoff_s
from services.kernel.averages import MovingAverage
from services.kernel.logs import get_logger
from services.kernel.process import run_blocking
from services.weights.errors import DailyCapReached, SourceFailed, Transient, Unreachable
from services.weights.transfer.web import Web

log = get_logger()

BURST_S = 0.25
_BUCKET = struct.Struct("<dd")
MAX_BACKOFF_S = 30.0
# The link is measured in stretches of WINDOW_S; a new one begins after a pause of IDLE_S.
WINDOW_S = 1.0
IDLE_S = 5.0
LATEST_WEIGHT = 0.2
# If a server wants more time than this, the next source is tried. The hub's windows have 300 s.
MAX_RETRY_AFTER_S = 330.0
COUNT_STEP_BYTES = 4 * 1024 * 1024
DAY_S = 86_400

T = TypeVar("T")
# After this many bytes of progress, the next failure counts as the first one again.
ENOUGH_BYTES = 16 * 1024
# Retries of a server that cannot be reached, before any byte of a file has arrived.
MAX_UNREACHABLE_RETRIES = 3


@dataclass(slots=True)
class TokenBucket:
    """Bytes refill at `rate` per second, up to a burst of `BURST_S`; a negative level is waited for."""

    rate: float
    level: float = 0.0
    at_s: float = 0.0

    def take(self, count: int, now_s: float) -> float:
        """Take `count` bytes; returns the seconds to wait."""
        self.level = min(self.rate * BURST_S, self.level + (now_s - self.at_s) * self.rate)
        self.at_s = now_s
        self.level -= count
        return max(0.0, -self.level / self.rate)


@dataclass(slots=True)
class SharedTokenBucket:
    """A token bucket in a file, shared by all processes of a machine. `now_s` must be a clock that they share."""

    rate: float
    path: Path

    def take(self, count: int, now_s: float) -> float:
        """As TokenBucket.take. Blocks while another process reads and writes two numbers."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            data = os.pread(fd, _BUCKET.size, 0)
            level, at_s = _BUCKET.unpack(data) if len(data) == _BUCKET.size else (0.0, now_s)
            # The clock restarts with the machine: an earlier time than the file's means a restart.
            bucket = (
                TokenBucket(rate=self.rate, level=level, at_s=at_s)
                if at_s <= now_s
                else TokenBucket(self.rate, 0.0, now_s)
            )
            wait_s = bucket.take(count, now_s)
            os.pwrite(fd, _BUCKET.pack(bucket.level, bucket.at_s), 0)
        finally:
            os.close(fd)
        return wait_s


@dataclass(slots=True)
class Pacer:
    """A bandwidth cap for all processes that share the bucket file. No cap if `bits_per_s` is 0."""

    bits_per_s: int
    now_s: Callable[[], float]
    path: Path
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _bucket: SharedTokenBucket = field(init=False)

    def __post_init__(self) -> None:
        self._bucket = SharedTokenBucket(rate=max(1.0, self.bits_per_s / 8), path=self.path)

    async def take(self, count: int) -> None:
        if not self.bits_per_s:
            return
        wait_s = self._bucket.take(count, self.now_s())
        if wait_s > 0:
            await self.sleep(wait_s)


@dataclass(slots=True)
class Meter:
    """Goodput over the last `window_s` seconds."""

    window_s: float = 10.0
    _marks: deque[tuple[float, int]] = field(default_factory=deque)
    _total: int = 0

    def count(self, size_bytes: int, now_s: float) -> None:
        self._total += size_bytes
        self._marks.append((now_s, self._total))
        while self._marks[0][0] < now_s - self.window_s:
            self._marks.popleft()

    def bytes_per_s(self, now_s: float) -> float:
        if not self._marks or now_s <= self._marks[0][0]:
            return 0.0
        return (self._total - self._marks[0][1]) / (now_s - self._marks[0][0])

    def is_slower(self, bits_per_s: float, now_s: float) -> bool:
        """Whether the rate over a full window was lower."""
        if not self._marks or now_s - self._marks[0][0] < self.window_s * 0.8:
            return False
        return self.bytes_per_s(now_s) * 8 < bits_per_s


@dataclass(slots=True)
class LinkRate:
    """Goodput of the link, over all downloads at once: a moving average of stretches of WINDOW_S."""

    _average: MovingAverage = field(default_factory=lambda: MovingAverage(weight=LATEST_WEIGHT))
    _begin_s: float = 0.0
    _last_s: float = float("-inf")
    _bytes: int = 0

    @property
    def bps(self) -> float:
        """Bits a second; 0 until the first stretch is complete."""
        return self._average.mean

    @property
    def has_begun(self) -> bool:
        return self._last_s > float("-inf")

    def note(self, size_bytes: int, now_s: float) -> None:
        is_new, self._last_s = now_s - self._last_s > IDLE_S, now_s
        if is_new:
            # When these bytes began to arrive is unknown: they only mark where the stretch begins.
            self._begin_s, self._bytes = now_s, 0
            return
        self._bytes += size_bytes
        took_s = now_s - self._begin_s
        if took_s < WINDOW_S:
            return
        self._average.note(self._bytes * 8 / took_s)
        self._begin_s, self._bytes = now_s, 0


class Traffic:
    """Bytes fetched today by all processes of a store, counted in steps so that not every block is a write.

    `add` adds bytes to a day and returns its total; it may block and runs on `io`.
    """

    def __init__(
        self, add: Callable[[str, int], int], io: Executor, daily_bytes: int, wall_s: Callable[[], float]
    ) -> None:
        self._add = add
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
        return await asyncio.get_running_loop().run_in_executor(self._io, self._add, day, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadLimits:
    connections: int
    piece_bytes: int
    slow_bps: int
    retries: int


@dataclass(slots=True, kw_only=True)
class DownloadTools:
    """What all downloads share. `count` counts downloaded bytes and raises DailyCapReached at the daily cap."""

    web: Web
    io: Executor
    pacer: Pacer
    limits: DownloadLimits
    parts: Path
    reserve: Callable[[int], None]
    count: Callable[[int], Awaitable[None]]
    link: LinkRate = field(default_factory=LinkRate)
    now_s: Callable[[], float] = time.monotonic
    wall_s: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: random.Random = field(default_factory=random.Random)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """Run blocking work on a thread. On cancellation, wait for its end: it still uses its files and its lock."""
        return await run_blocking(self.io, partial(work, *args))

    async def back_off(
        self, failures: int, error: Transient, waits_until: Callable[[float], None] = lambda wall_s: None
    ) -> None:
        """Wait before the next attempt; SourceFailed after too many retries, or where the wait would be too long.

        The time that the server asks for goes first, else exponential back-off with jitter. `waits_until` is called
        with the end of a wait that the server asked for, in seconds since 1970.
        """
        asked_s = error.retry_after_s
        wait_s = asked_s
        if wait_s is None:
            wait_s = backoff_s(failures, longest_s=MAX_BACKOFF_S, chance=self.chance.random())
        if failures > self.limits.retries or wait_s > MAX_RETRY_AFTER_S:
            asks = f"; it asks to wait {asked_s:.0f} s" if asked_s else ""
            raise SourceFailed(f"{error.message}{asks}", retry_after_s=asked_s).of_part(error.part) from error
        if asked_s:
            waits_until(self.wall_s() + asked_s)
        log.warning("weights_retry", why=error.message, wait_s=round(wait_s, 1))
        await self.sleep(wait_s)

    async def retry(
        self,
        once: Callable[[], Awaitable[T]],
        done_bytes: Callable[[], int] = lambda: 0,
        *,
        waits_until: Callable[[float], None] = lambda wall_s: None,
    ) -> T:
        """Retry until it works, or fails too often without progress in between."""
        failures, before = 0, done_bytes()
        while True:
            try:
                return await once()
            except Transient as error:
                failures = 1 if done_bytes() - before >= ENOUGH_BYTES else failures + 1
                before = done_bytes()
                await self.back_off(failures, error, waits_until)

    async def retry_probe(
        self, once: Callable[[], Awaitable[T]], *, waits_until: Callable[[float], None] = lambda wall_s: None
    ) -> T:
        """As `retry`, for the first request to a server: gives up after few attempts where it is unreachable."""
        unreachable = 0

        async def attempt() -> T:
            nonlocal unreachable
            try:
                return await once()
            except Unreachable as error:
                unreachable += 1
                if unreachable > MAX_UNREACHABLE_RETRIES:
                    raise SourceFailed(error.message).of_part(error.part) from error
                raise

        return await self.retry(attempt, waits_until=waits_until)
