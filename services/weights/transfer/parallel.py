"""Pieces of one file over several connections at once; as many as the server bears."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from fanlight.errors import NotFound
from services.weights.errors import Refused, SourceFailed, TokenRefused, Transient
from services.weights.references.manifest import ByteSpan
from services.weights.transfer.pacing import ENOUGH_BYTES, Meter
from services.weights.transfer.partial import Layout, Partial, piece_bytes
from services.weights.transfer.web import RemoteFile, Web

FIRST_CONNECTIONS = 4
LOOK_S = 1.0


class SpanWriter(Protocol):
    """What a filling needs of the download it is part of."""

    async def write(self, part: Partial, span: ByteSpan, blocks: AsyncIterator[bytes]) -> None: ...

    async def pause(self, failures: int, error: Transient) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    piece: ByteSpan
    round: int


@dataclass(slots=True, kw_only=True)
class ParallelDownload:
    """Additive growth, halved on trouble. An address that has run out behind a redirect is asked for again."""

    writer: SpanWriter
    part: Partial
    layout: Layout
    web: Web
    url: str
    remote: RemoteFile
    meter: Meter
    most_connections: int
    most_piece_bytes: int
    # Below this the source is left; 0 where there is no other.
    slow_bps: int
    now_s: Callable[[], float]
    _allowed: int = FIRST_CONNECTIONS
    _failures: int = 0
    _done_before: int = 0
    # Each trouble begins a round; one that hits all connections at once counts once.
    _round: int = 0
    _tasks: dict[asyncio.Task[None], "_Flight"] = field(default_factory=dict)

    async def run(self) -> None:
        try:
            while not self.part.map.is_complete:
                self._launch()
                done, _ = await asyncio.wait(self._tasks, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await self._land(task)
                self._refuse_slow()
        finally:
            await self._cancel()

    def _launch(self) -> None:
        while len(self._tasks) < min(self._allowed, self.most_connections):
            piece = self.part.map.take(self._wanted_bytes(), self.layout.borders)
            if piece is None:
                return
            self._tasks[asyncio.create_task(self._fetch(piece))] = _Flight(piece=piece, round=self._round)

    def _wanted_bytes(self) -> int:
        return piece_bytes(
            left=self.part.map.unasked_bytes,
            connections=self._allowed,
            bytes_per_s=self.meter.bytes_per_s(self.now_s()),
            largest=self.most_piece_bytes,
        )

    async def _fetch(self, piece: ByteSpan) -> None:
        begin = self.layout.to_source(piece.begin)
        async with self.web.piece(self.remote.url, ByteSpan(begin, begin + len(piece)), self.remote) as blocks:
            await self.writer.write(self.part, piece, blocks)

    async def _land(self, task: asyncio.Task[None]) -> None:
        flight = self._tasks.pop(task)
        self.part.map.land(flight.piece)
        error = task.exception()
        if error is None:
            self._allowed, self._failures = min(self._allowed + 1, self.most_connections), 0
        elif isinstance(error, Transient):
            await self._ease(error, flight)
        elif isinstance(error, TokenRefused | NotFound) and self.remote.url != self.url:
            await self._ask_again(error)
        else:
            raise error

    async def _ease(self, error: Transient, flight: "_Flight") -> None:
        """Cut connections are taken up at once while bytes come; a server that refuses is left in peace."""
        done_bytes = self.part.map.done_bytes
        has_come, self._done_before = done_bytes - self._done_before >= ENOUGH_BYTES, done_bytes
        if has_come:
            self._failures = 0
        if flight.round < self._round:
            return
        self._round += 1
        if has_come and not isinstance(error, Refused):
            return
        self._failures += 1
        self._allowed = max(1, self._allowed // 2)
        await self.writer.pause(self._failures, error)

    async def _ask_again(self, error: TokenRefused | NotFound) -> None:
        self._failures += 1
        await self.writer.pause(self._failures, Transient(error.message))
        fresh = await self.web.probe(self.url)
        self.remote = replace(self.remote, url=fresh.url)

    def _refuse_slow(self) -> None:
        now_s = self.now_s()
        if self.slow_bps and self.meter.is_slower(self.slow_bps, now_s):
            raise SourceFailed(f"is slow: {self.meter.bytes_per_s(now_s) * 8:.0f} bits a second")

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for flight in self._tasks.values():
            self.part.map.land(flight.piece)
        self._tasks.clear()
