"""Ranged parallel download: pieces of one file over several connections, as many as the server tolerates."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from fanlight.errors import FanlightError, NotFound
from services.weights.errors import (
    NoRanges,
    NotAllowed,
    RequestRefused,
    ServerBusy,
    SourceChanged,
    SourceFailed,
    TokenRefused,
    Transient,
    Untrusted,
)
from services.weights.references.manifest import ByteSpan
from services.weights.transfer.answers import RemoteFile
from services.weights.transfer.pacing import ENOUGH_BYTES, Meter
from services.weights.transfer.partial import Layout, PartialFile, piece_bytes
from services.weights.transfer.web import Web

FIRST_CONNECTIONS = 4
SPEED_CHECK_S = 1.0
# How often a server that sent ranges before may answer with the whole file before it is read in one go.
MAX_WHOLE_ANSWERS = 3
# How often a server that sent pieces before may refuse in a row: it may count connections that have ended.
MAX_REFUSALS = 3


class SpanWriter(Protocol):
    """What a parallel download asks of its Download: writing, and back-off."""

    async def write(self, part: PartialFile, span: ByteSpan, blocks: AsyncIterator[bytes]) -> None: ...

    async def back_off(self, failures: int, error: Transient) -> None: ...

    async def renew(self) -> str:
        """The source's first address, signed again where it is a signed one."""
        ...

    async def probe(self, url: str) -> RemoteFile: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    piece: ByteSpan
    round: int
    url: str


@dataclass(slots=True, kw_only=True)
class ParallelDownload:
    """Adapts the number of connections: one more after each piece, half after a failure (AIMD, as in TCP).

    An address that ran out, signed or behind a redirect, is requested again from the first one.
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
    _done_at_renewal: int = -1
    _pieces: int = 0
    _refusals: int = 0
    _whole_answers: int = 0
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
            self._tasks[asyncio.create_task(self._fetch(piece))] = _Flight(
                piece=piece, round=self._round, url=self.remote.url
            )

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
            self._pieces, self._refusals = self._pieces + 1, 0
        elif isinstance(error, Transient):
            await self._slow_down(error, flight)
        elif isinstance(error, NotAllowed | Untrusted) and self._pieces:
            # A captive portal in between: by a redirect, or with a certificate of its own.
            await self._slow_down(Transient(error.message).of_part(error.part), flight)
        elif isinstance(error, TokenRefused | NotFound | RequestRefused):
            await self._after_refusal(error, flight)
        elif isinstance(error, NoRanges) and self._pieces and self._whole_answers < MAX_WHOLE_ANSWERS:
            self._whole_answers += 1
            await self._slow_down(Transient(error.message).of_part(error.part), flight)
        else:
            raise error

    async def _after_refusal(self, error: TokenRefused | NotFound | RequestRefused, flight: "_Flight") -> None:
        """Renew an address that ran out. Of one that lasts, a refusal is about too many connections, or is final."""
        if flight.url != self.remote.url:
            return
        if await self._renew(error):
            return
        # Those that hit several connections at once count once.
        self._refusals += flight.round == self._round
        is_alone = not self._pieces and not self._tasks
        if is_alone or self._refusals > MAX_REFUSALS:
            raise error
        self.max_connections = max(1, len(self._tasks))
        try:
            await self._slow_down(ServerBusy(error.message).of_part(error.part), flight)
        except SourceFailed:
            # It was asked often enough: what it says is meant.
            raise error from None

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

    async def _renew(self, error: FanlightError) -> bool:
        """Request the address again; False if there is nothing to renew. Waits if the last one brought nothing."""
        url = await self.writer.renew()
        if url == self.url == self.remote.url:
            return False
        done_bytes = self.part.map.done_bytes
        if done_bytes - self._done_at_renewal < ENOUGH_BYTES:
            self._failures += 1
            await self.writer.back_off(self._failures, Transient(error.message).of_part(error.part))
        self._done_at_renewal = done_bytes
        fresh = await self.writer.probe(url)
        if not self.remote.is_pinned and fresh.is_other_than(self.remote):
            raise SourceChanged(f"{url.split('/')[2]} has a different file than before")
        self.url, self.remote = url, replace(self.remote, url=fresh.url)
        return True

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
