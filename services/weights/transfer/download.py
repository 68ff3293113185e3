"""One file from one of its sources into a part on disk: ranges in parallel, resumed, checked. Knows no manifest."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial as bind
from pathlib import Path
from typing import Protocol, TypeVar

from fanlight.errors import FanlightError, NotFound
from services.kernel.logs import get_logger
from services.weights.errors import (
    NoRanges,
    SourceChanged,
    SourceFailed,
    TokenRefused,
    Transient,
    WrongBytes,
    tell,
)
from services.weights.references.manifest import ByteSpan
from services.weights.references.tensors import Digested, FileDigests
from services.weights.transfer.pacing import DownloadTools, Meter
from services.weights.transfer.parallel import ParallelDownload
from services.weights.transfer.partial import FileSegment, Layout, Partial, whole
from services.weights.transfer.web import RemoteFile

log = get_logger()

T = TypeVar("T")
STEP_BYTES = 8 * 1024 * 1024
FLUSH_BYTES = 256 * 1024
MAX_RESTARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadProgress:
    """How a download stands; `seconds_left` is None while unknown. `whole` is all files of the reference together."""

    reference: str
    path: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    source: str
    whole: "DownloadProgress | None" = None

    @property
    def seconds_left(self) -> float | None:
        return (self.total_bytes - self.done_bytes) / self.bytes_per_s if self.bytes_per_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanDigest:
    """sha256 of bytes of the download: a tensor's or a chunk's."""

    span: ByteSpan
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadTarget:
    """What is downloaded. `segments` are the wanted parts of the source, None is all of it.

    `size_bytes` is the source's whole size, None where only the source knows it; `sha256` is empty where nobody does.
    """

    reference: str
    path: str
    key: str
    urls: tuple[str, ...]
    size_bytes: int | None
    sha256: str = ""
    segments: tuple[FileSegment, ...] | None = None
    # Tells downloads of the same thing in different forms apart.
    form: str = ""
    digests: tuple[SpanDigest, ...] = ()

    @property
    def is_pinned(self) -> bool:
        return bool(self.sha256 or self.digests)


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
class ProgressTally:
    """Adds up the downloads of one reference; each report is passed on with the sum as its `whole`."""

    reference: str
    fetch_bytes: int
    report: Callable[[DownloadProgress], None]
    _files: dict[str, DownloadProgress] = field(default_factory=dict)

    def tell(self, progress: DownloadProgress) -> None:
        self._files[progress.path] = progress
        files = self._files.values()
        active = [f for f in files if f.done_bytes < f.total_bytes]
        whole = DownloadProgress(
            reference=self.reference,
            path="",
            done_bytes=sum(f.done_bytes for f in files),
            total_bytes=max(self.fetch_bytes, sum(f.total_bytes for f in files)),
            bytes_per_s=sum(f.bytes_per_s for f in active or files),
            source=progress.source,
        )
        self.report(replace(progress, whole=whole))


class DownloadFollower(Protocol):
    """What goes along behind a download, and says at its end whether the bytes are right."""

    def advance(self) -> None: ...

    async def finish(self) -> Digested | None: ...

    async def stop(self) -> None: ...


class StreamingHasher:
    """Digests what is there without a gap from the first byte, and has it written, while the rest is still coming."""

    def __init__(self, part: Partial, tools: DownloadTools, *, is_safetensors: bool) -> None:
        self._part = part
        self._tools = tools
        self._digests = FileDigests(size_bytes=part.map.size, is_safetensors=is_safetensors)
        self._at = 0
        self._task: asyncio.Task[None] | None = None

    def advance(self) -> None:
        is_idle = self._task is None or self._task.done()
        if is_idle and self._part.map.frontier - self._at >= STEP_BYTES:
            self._task = asyncio.create_task(self._feed(self._part.map.frontier))

    async def _feed(self, end: int) -> None:
        span = ByteSpan(self._at, end)
        await self._tools.run(self._part.feed, self._digests.update, span)
        await self._tools.run(self._part.begin_writing, span)
        self._at = end

    async def finish(self) -> Digested:
        if self._task is not None:
            await self._task
        await self._feed(self._part.map.size)
        return self._digests.finish()

    async def stop(self) -> None:
        """Let no thread read the part any more."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


def drop_wrong(part: Partial, digests: Sequence[SpanDigest]) -> int:
    """Count the spans whose bytes are not those of their digests as missing again; how many there were."""
    bad = [d.span for d in digests if part.digest(d.span) != d.sha256]
    for span in bad:
        part.drop(span)
    return len(bad)


class Download:
    """Use once. The caller holds the lock of the target's key."""

    def __init__(
        self,
        target: DownloadTarget,
        tools: DownloadTools,
        report: Callable[[DownloadProgress], None],
        *,
        follow: Callable[[Partial], DownloadFollower] | None = None,
    ) -> None:
        """`follow` makes what checks the bytes in place of the target's own digests."""
        self._target = target
        self._tools = tools
        self._report = report
        self._meter = Meter()
        self._downloaded = 0
        self._source = ""
        self._follow = follow
        self._follower: DownloadFollower | None = None

    async def run(self) -> Downloaded:
        """A verified part, or one error that tells why no source gave it."""
        failures: list[FanlightError] = []
        for number, url in enumerate(self._target.urls):
            is_last = number == len(self._target.urls) - 1
            try:
                return await self._from_source(url, number, is_last=is_last)
            except (SourceFailed, WrongBytes, NotFound, TokenRefused) as error:
                log.warning("weights_source_failed", path=self._target.path, why=error.message, is_last=is_last)
                failures.append(error)
        raise tell(self._target.reference, failures)

    async def _from_source(self, url: str, number: int, *, is_last: bool) -> Downloaded:
        """A source may change under the download, or have spoilt a part begun elsewhere: then all of it again."""
        for attempt in range(MAX_RESTARTS):
            ask = self._tools.web.probe if attempt else self._tools.web.probed
            # Before a byte has come nobody knows whether anybody is there.
            patience = self._tools.retry if self._downloaded else self._tools.retry_probe
            remote = await patience(bind(ask, url))
            layout = self._check(remote)
            part = await self._tools.run(self._open, layout, self._identity(remote))
            try:
                await self._fill(part, layout, url, remote, is_last=is_last)
                digested = await self._verify(part, remote.sha256)
                return Downloaded(
                    path=part.path,
                    digested=digested,
                    source=number,
                    etag=remote.etag,
                    downloaded_bytes=self._downloaded,
                )
            except SourceChanged:
                await self._tools.run(part.restart)
            except WrongBytes:
                if not self._target.digests:
                    await self._tools.run(part.restart)
                if part.resumed_bytes == 0 and not (self._target.digests and attempt == 0):
                    raise
            finally:
                if self._follower:
                    await self._follower.stop()
                part.close()
        raise SourceFailed(f"{self._source} changed or was wrong {MAX_RESTARTS} times")

    def _check(self, remote: RemoteFile) -> Layout:
        target, host = self._target, remote.url.split("/")[2]
        if remote.size_bytes is None:
            raise SourceFailed(f"{host} tells no length")
        if target.size_bytes is not None and remote.size_bytes != target.size_bytes:
            raise WrongBytes(f"{host} has {remote.size_bytes} bytes instead of {target.size_bytes}")
        if target.sha256 and remote.sha256 and remote.sha256 != target.sha256:
            raise WrongBytes(f"{host} says itself that it has another file: sha256 {remote.sha256}")
        return Layout(segments=target.segments) if target.segments else whole(remote.size_bytes)

    def _identity(self, remote: RemoteFile) -> str:
        """Without a digest, only bytes of one and the same version may be put together."""
        if self._target.is_pinned:
            return f"{self._target.key}{self._target.form}"
        return f"{remote.url.split('?')[0]} {remote.etag}"

    def _open(self, layout: Layout, identity: str) -> Partial:
        there = self._tools.parts / f"{self._target.key}.part"
        allocated = there.stat().st_blocks * 512 if there.exists() else 0
        self._tools.reserve(max(0, layout.size - allocated))
        return Partial(self._tools.parts, self._target.key, size=layout.size, identity=identity)

    async def _fill(self, part: Partial, layout: Layout, url: str, remote: RemoteFile, *, is_last: bool) -> None:
        self._source, self._meter = remote.url.split("/")[2], Meter()
        self._follower = self._following(part)
        if not self._target.is_pinned and not remote.etag and part.resumed_bytes:
            # Nothing tells whether it is still the same file.
            await self._tools.run(part.restart)
        if not remote.has_ranges:
            await self._stream(part, url, remote)
            return
        try:
            await self._filling(part, layout, url, remote, is_last=is_last).run()
        except NoRanges:
            await self._stream(part, url, remote)

    def _filling(
        self, part: Partial, layout: Layout, url: str, remote: RemoteFile, *, is_last: bool
    ) -> ParallelDownload:
        limits = self._tools.limits
        return ParallelDownload(
            writer=self,
            part=part,
            layout=layout,
            web=self._tools.web,
            url=url,
            remote=remote,
            meter=self._meter,
            most_connections=limits.connections,
            most_piece_bytes=limits.piece_bytes,
            slow_bps=0 if is_last else limits.slow_bps,
            now_s=self._tools.now_s,
        )

    async def _stream(self, part: Partial, url: str, remote: RemoteFile) -> None:
        """From the first byte on, over and over until it is all there."""
        if self._target.segments:
            raise SourceFailed(f"{self._source} sends no ranges, and only a part of the file is wanted")

        async def once() -> None:
            async with self._tools.web.stream(url, remote) as blocks:
                await self.write(part, ByteSpan(0, part.map.size), blocks)

        while not part.map.is_complete:
            await self._tools.retry(once, lambda: part.map.done_bytes)

    async def write(self, part: Partial, span: ByteSpan, blocks: AsyncIterator[bytes]) -> None:
        """Write what comes for the span, leaving out what is there already; also what came before a failure."""
        at, buffer = span.begin, bytearray()
        try:
            async for block in blocks:
                await self._tools.pacer.take(len(block))
                buffer += block
                if len(buffer) >= FLUSH_BYTES:
                    full, buffer = buffer, bytearray()
                    at = await self._flush(part, at, full)
        finally:
            await self._flush(part, at, buffer)

    async def _flush(self, part: Partial, at: int, buffer: bytearray) -> int:
        end = at + len(buffer)
        if not buffer:
            return end
        skip = max(0, min(end, part.map.frontier) - at)
        if skip < len(buffer):
            await self._tools.run(part.write, at + skip, bytes(buffer[skip:]))
            part.note(at + skip, end)
        self._downloaded += len(buffer)
        now_s = self._tools.now_s()
        self._meter.count(len(buffer), now_s)
        self._tools.link.note(len(buffer), now_s)
        if self._follower:
            self._follower.advance()
        self._tell(part, now_s)
        await self._tools.count(len(buffer))
        return end

    def _tell(self, part: Partial, now_s: float) -> None:
        target = self._target
        self._report(
            DownloadProgress(
                reference=target.reference,
                path=target.path,
                done_bytes=part.map.done_bytes,
                total_bytes=part.map.size,
                bytes_per_s=self._meter.bytes_per_s(now_s),
                source=self._source,
            )
        )

    async def pause(self, failures: int, error: Transient) -> None:
        await self._tools.back_off(failures, error)

    def _following(self, part: Partial) -> DownloadFollower | None:
        if self._follow is not None:
            return self._follow(part)
        if self._target.segments is not None:
            return None
        return StreamingHasher(part, self._tools, is_safetensors=self._target.path.endswith(".safetensors"))

    async def _verify(self, part: Partial, said_sha256: str) -> Digested | None:
        """The digests of the part; what is wrong is dropped. Where nothing is pinned, the source's own word is held
        against it. WrongBytes.
        """
        digests = self._target.digests if self._follow is None else ()
        bad = await self._tools.run(drop_wrong, part, digests)
        if bad:
            raise WrongBytes(f"{self._source} sent {bad} of {len(digests)} chunks or tensors wrong")
        if self._follower is None:
            return None
        digested = await self._follower.finish()
        expected = self._target.sha256 or said_sha256
        if digested and self._follow is None and expected and digested.sha256 != expected:
            raise WrongBytes(f"sha256 is {digested.sha256} instead of {expected} ({self._source})")
        return digested
