"""What a download is told and what it tells. Values, and the tools that all downloads share."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from services.kernel.logs import get_logger
from services.kernel.threads import to_its_end
from services.weights.chunks import Segment, Span
from services.weights.digesting import Digested
from services.weights.errors import SourceFailed, Transient, Unreachable
from services.weights.pacing import MAX_RETRY_AFTER_S, LinkRate, Pacer, backoff_s
from services.weights.web import Web

log = get_logger()
T = TypeVar("T")

# Bytes that must have come between two failures for the second to count as a first one.
ENOUGH_BYTES = 16 * 1024
# How often somebody is asked again who cannot be reached, before anything of a file has come.
KNOCKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a download stands; `seconds_left` is None while unknown. `whole` is all files of the reference together."""

    reference: str
    path: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    source: str
    whole: "Progress | None" = None

    @property
    def seconds_left(self) -> float | None:
        return (self.total_bytes - self.done_bytes) / self.bytes_per_s if self.bytes_per_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """sha256 of bytes of the download: a tensor's or a chunk's."""

    span: Span
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is downloaded. `segments` are the wanted parts of the source, None is all of it.

    `size_bytes` is the source's whole size, None where only the source knows it; `sha256` is empty where nobody does.
    """

    reference: str
    path: str
    key: str
    urls: tuple[str, ...]
    size_bytes: int | None
    sha256: str = ""
    segments: tuple[Segment, ...] | None = None
    # Tells downloads of the same thing in different forms apart.
    form: str = ""
    digests: tuple[Digest, ...] = ()

    @property
    def is_pinned(self) -> bool:
        return bool(self.sha256 or self.digests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    connections: int
    piece_bytes: int
    slow_bps: int
    retries: int


@dataclass(slots=True, kw_only=True)
class Tools:
    """What every download shares. `count` counts bytes off the link, and raises when a day's are used up."""

    web: Web
    io: Executor
    pacer: Pacer
    limits: Limits
    parts: Path
    reserve: Callable[[int], None]
    count: Callable[[int], Awaitable[None]]
    link: LinkRate = field(default_factory=LinkRate)
    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: random.Random = field(default_factory=random.Random)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """On a thread. Who is cancelled goes on when it has ended: until then the work needs its files and its lock."""
        return await to_its_end(self.io, partial(work, *args))

    async def pause(self, failures: int, error: Transient) -> None:
        """Wait before the next try; SourceFailed after too many, or where the wait would be too long."""
        wait_s = backoff_s(failures, error.retry_after_s, self.chance)
        if failures > self.limits.retries or wait_s > MAX_RETRY_AFTER_S:
            raise SourceFailed(error.message, retry_after_s=error.retry_after_s) from error
        log.warning("weights_asked_again", why=error.message, wait_s=round(wait_s, 1))
        await self.sleep(wait_s)

    async def persist(self, once: Callable[[], Awaitable[T]], done_bytes: Callable[[], int] = lambda: 0) -> T:
        """Until it works, or fails too often without progress between."""
        failures, before = 0, done_bytes()
        while True:
            try:
                return await once()
            except Transient as error:
                failures = 1 if done_bytes() - before >= ENOUGH_BYTES else failures + 1
                before = done_bytes()
                await self.pause(failures, error)

    async def ask(self, once: Callable[[], Awaitable[T]]) -> T:
        """As `persist`, for the first question to somebody: given up soon where nobody can be reached."""
        knocks = 0

        async def knock() -> T:
            nonlocal knocks
            try:
                return await once()
            except Unreachable as error:
                knocks += 1
                if knocks > KNOCKS:
                    raise SourceFailed(error.message) from error
                raise

        return await self.persist(knock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """`source` is the source's place in the list, `etag` its own; `downloaded_bytes` came over the link this time.

    `digested` is None where only parts of a file were wanted.
    """

    path: Path
    digested: Digested | None
    source: int | None
    etag: str
    downloaded_bytes: int


@dataclass(slots=True, kw_only=True)
class Tally:
    """Adds up the downloads of one reference; each report is passed on with the sum as its `whole`."""

    reference: str
    fetch_bytes: int
    report: Callable[[Progress], None]
    _files: dict[str, Progress] = field(default_factory=dict)

    def tell(self, progress: Progress) -> None:
        self._files[progress.path] = progress
        files = self._files.values()
        active = [f for f in files if f.done_bytes < f.total_bytes]
        whole = Progress(
            reference=self.reference,
            path="",
            done_bytes=sum(f.done_bytes for f in files),
            total_bytes=max(self.fetch_bytes, sum(f.total_bytes for f in files)),
            bytes_per_s=sum(f.bytes_per_s for f in active or files),
            source=progress.source,
        )
        self.report(replace(progress, whole=whole))
