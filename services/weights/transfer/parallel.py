"""Ranged parallel download: pieces of one file over several connections, as many as the server tolerates."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from fanlight.errors import NotFound
from services.weights.errors import ServerBusy, SourceFailed, TokenRefused, Transient
from services.weights.references.manifest import ByteSpan
from services.weights.transfer.pacing import ENOUGH_BYTES, Meter
from services.weights.transfer.partial import Layout, PartialFile, piece_bytes
from services.weights.transfer.web import RemoteFile, Web

FIRST_CONNECTIONS = 4
SPEED_CHECK_S = 1.0


class SpanWriter(Protocol):
    """What a parallel download asks of its Download: writing, and back-off."""

    async def write(self, part: PartialFile, span: ByteSpan, blocks: AsyncIterator[bytes]) -> None: ...

    async def back_off(self, failures: int, error: Transient) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    piece: ByteSpan
    round: int


@dataclass(slots=True, kw_only=True)
class ParallelDownload:
    """Adapts the number of connections: one more after each piece, half after a failure (AIMD, as in TCP).

    A redirect target that expired is requested again from the original address.
    """

    writer: SpanWriter
    part: PartialFile
    layout: Layout
    web: Web
    url: str
    remote: RemoteFile
    meter: Meter
    max_connections: int
    max_piece_bytes: int
    # A slower source is given up, in bits per second; 0 if there is no other source.
    slow_bps: int
    now_s: Callable[[], float]
    _allowed: int = FIRST_CONNECTIONS
    _failures: int = 0
    _done_before: int = 0
    # Each failure starts a round; one that hits all connections at once counts once.
    _round: int = 0
    _tasks: dict[asyncio.Task[None], "_Flight"] = field(default_factory=dict)

    async def run(self) -> None:
        try:
            while not self.part.map.is_complete:
                self._launch()
                done, _ = await asyncio.wait(self._tasks, timeout=SPEED_CHECK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await self._finish_piece(task)
                self._leave_if_slow()
        finally:
            await self._cancel()

    def _launch(self) -> None:
        while len(self._tasks) < min(self._allowed, self.max_connections):
            piece = self.part.map.take(self._wanted_bytes(), self.layout.borders)
            if piece is None:
                return
            self._tasks[asyncio.create_task(self._fetch(piece))] = _Flight(piece=piece, round=self._round)

    def _wanted_bytes(self) -> int:
        return piece_bytes(
            left=self.part.map.unrequested_bytes,
            connections=self._allowed,
            bytes_per_s=self.meter.bytes_per_s(self.now_s()),
            largest=self.max_piece_bytes,
        )

    async def _fetch(self, piece: ByteSpan) -> None:
        begin = self.layout.to_source(piece.begin)
        async with self.web.piece(self.remote.url, ByteSpan(begin, begin + len(piece)), self.remote) as blocks:
            await self.writer.write(self.part, piece, blocks)

    async def _finish_piece(self, task: asyncio.Task[None]) -> None:
        flight = self._tasks.pop(task)
        self.part.map.release(flight.piece)
        error = task.exception()
        if error is None:
            self._allowed, self._failures = min(self._allowed + 1, self.max_connections), 0
        elif isinstance(error, Transient):
            await self._slow_down(error, flight)
        elif isinstance(error, TokenRefused | NotFound) and self.remote.url != self.url:
            await self._refresh_address(error)
        else:
            raise error

    async def _slow_down(self, error: Transient, flight: "_Flight") -> None:
        """Retry cut connections at once while bytes arrive; back off from a busy server and use fewer connections."""
        done_bytes = self.part.map.done_bytes
        has_progress, self._done_before = done_bytes - self._done_before >= ENOUGH_BYTES, done_bytes
        if has_progress:
            self._failures = 0
        if flight.round < self._round:
            return
        self._round += 1
        if has_progress and not isinstance(error, ServerBusy):
            return
        self._failures += 1
        self._allowed = max(1, self._allowed // 2)
        await self.writer.back_off(self._failures, error)

    async def _refresh_address(self, error: TokenRefused | NotFound) -> None:
        self._failures += 1
        await self.writer.back_off(self._failures, Transient(error.message))
        fresh = await self.web.probe(self.url)
        self.remote = replace(self.remote, url=fresh.url)

    def _leave_if_slow(self) -> None:
        now_s = self.now_s()
        if self.slow_bps and self.meter.is_slower(self.slow_bps, now_s):
            raise SourceFailed(f"too slow: {self.meter.bytes_per_s(now_s) * 8:.0f} bits per second")

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for flight in self._tasks.values():
            self.part.map.release(flight.piece)
        self._tasks.clear()
