"""How fast and how much may be fetched. The arithmetic is pure; clocks and sleeping are passed in."""

import asyncio
import fcntl
import os
import random
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

BURST_S = 0.25
_BUCKET = struct.Struct("<dd")
MAX_BACKOFF_S = 30.0
# The link is measured in stretches of so long; after a pause of IDLE_S a new one begins.
WINDOW_S = 1.0
IDLE_S = 5.0
LATEST_WEIGHT = 0.2
# A server may ask to be left alone; longer than this the next source is tried.
MAX_RETRY_AFTER_S = 120.0


@dataclass(slots=True)
class Bucket:
    """Tokens that refill at `rate` a second, at most `BURST_S` worth of them; a debt is waited for."""

    rate: float
    level: float = 0.0
    at_s: float = 0.0

    def take(self, count: int, now_s: float) -> float:
        """Take so many tokens; the seconds to wait for it."""
        self.level = min(self.rate * BURST_S, self.level + (now_s - self.at_s) * self.rate)
        self.at_s = now_s
        self.level -= count
        return max(0.0, -self.level / self.rate)


@dataclass(slots=True)
class SharedBucket:
    """A bucket in a file, for all processes of a machine. `now_s` must be a clock that they share."""

    rate: float
    path: Path

    def take(self, count: int, now_s: float) -> float:
        """As Bucket.take. Blocks for as long as another process reads and writes two numbers."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            data = os.pread(fd, _BUCKET.size, 0)
            level, at_s = _BUCKET.unpack(data) if len(data) == _BUCKET.size else (0.0, now_s)
            # A clock that went back has begun anew with the machine.
            bucket = Bucket(rate=self.rate, level=level, at_s=at_s) if at_s <= now_s else Bucket(self.rate, 0.0, now_s)
            wait_s = bucket.take(count, now_s)
            os.pwrite(fd, _BUCKET.pack(bucket.level, bucket.at_s), 0)
        finally:
            os.close(fd)
        return wait_s


@dataclass(slots=True)
class Pacer:
    """A cap on the bytes of all processes that share the file. No cap when `bits_per_s` is 0."""

    bits_per_s: int
    now_s: Callable[[], float]
    path: Path
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _bucket: SharedBucket = field(init=False)

    def __post_init__(self) -> None:
        self._bucket = SharedBucket(rate=max(1.0, self.bits_per_s / 8), path=self.path)

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
        """Whether a full window has passed and less came than that."""
        if not self._marks or now_s - self._marks[0][0] < self.window_s * 0.8:
            return False
        return self.bytes_per_s(now_s) * 8 < bits_per_s


@dataclass(slots=True)
class LinkRate:
    """What the link gives, over all downloads at once: an exponentially weighted mean of stretches of WINDOW_S."""

    bps: float = 0.0
    _begin_s: float = 0.0
    _last_s: float = float("-inf")
    _bytes: int = 0

    @property
    def has_begun(self) -> bool:
        return self._last_s > float("-inf")

    def note(self, size_bytes: int, now_s: float) -> None:
        is_new, self._last_s = now_s - self._last_s > IDLE_S, now_s
        if is_new:
            # When these began to come is not known: they only say when the stretch begins.
            self._begin_s, self._bytes = now_s, 0
            return
        self._bytes += size_bytes
        took_s = now_s - self._begin_s
        if took_s < WINDOW_S:
            return
        latest_bps = self._bytes * 8 / took_s
        self.bps = latest_bps if not self.bps else (1 - LATEST_WEIGHT) * self.bps + LATEST_WEIGHT * latest_bps
        self._begin_s, self._bytes = now_s, 0


def backoff_s(failures: int, retry_after_s: float | None, chance: random.Random) -> float:
    """How long to wait after so many failures in a row; what the server asked for goes first."""
    if retry_after_s is not None:
        return retry_after_s
    return min(MAX_BACKOFF_S, 0.2 * 2.0 ** min(failures, 10)) * chance.uniform(0.5, 1.0)
