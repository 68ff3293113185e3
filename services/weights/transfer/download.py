"""Download one file from one of its sources: parallel ranges, resume, digests checked. Knows no manifest, no store."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial as bind
from pathlib import Path
from typing import Protocol

from fanlight.errors import FanlightError, NotFound
from services.kernel.logs import get_logger
from services.weights.errors import (
    NoRanges,
    SourceChanged,
    SourceFailed,
    TokenRefused,
    Transient,
    WrongBytes,
    combine_failures,
    names_source,
)
from services.weights.references.manifest import ByteSpan
from services.weights.references.tensors import Digested, FileDigests
from services.weights.transfer.pacing import DownloadTools, Meter
from services.weights.transfer.parallel import ParallelDownload
from services.weights.transfer.partial import FileSegment, Layout, PartialFile, whole_file_layout
from services.weights.transfer.web import RemoteFile

log = get_logger()

STEP_BYTES = 8 * 1024 * 1024
FLUSH_BYTES = 256 * 1024
MAX_RESTARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadProgress:
    """Progress of one file; `seconds_left` is None while unknown. `whole`: all files of the reference together."""

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
    """sha256 of a span of the download: a tensor or a chunk."""

    span: ByteSpan
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadTarget:
    """What to download. `segments`: the needed parts of the source file, None for all of it.

    `size_bytes` is the size of the source file, None if only the source knows it; `sha256` is empty if unknown.
    """

    reference: str
    path: str
    key: str
    urls: tuple[str, ...]
    size_bytes: int | None
    sha256: str = ""
    segments: tuple[FileSegment, ...] | None = None
    # Distinguishes downloads of the same file in different forms.
    form: str = ""
    digests: tuple[SpanDigest, ...] = ()

    @property
    def is_pinned(self) -> bool:
        return bool(self.sha256 or self.digests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """`source` is the index of the source, `etag` its ETag; `downloaded_bytes` excludes bytes of earlier attempts.

    `digested` is None if only parts of a file were downloaded.
    """

    path: Path
    digested: Digested | None
    source: int | None
    etag: str
    downloaded_bytes: int


@dataclass(slots=True, kw_only=True)
class ProgressTally:
    """Sums the progress of all files of one reference; passes each report on with the sum as its `whole`."""

    reference: str
    fetch_bytes: int
    report: Callable[[DownloadProgress], None]
    _files: dict[str, DownloadProgress] = field(default_factory=dict)

    def update(self, progress: DownloadProgress) -> None:
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
    """Reads a download's bytes while it runs, and checks them at its end."""

    def advance(self) -> None: ...

    async def finish(self) -> Digested | None: ...

    async def stop(self) -> None: ...


class StreamingHasher:
    """Digests the contiguous bytes from the start while the rest still arrives, and starts writing them to disk."""

    def __init__(self, part: PartialFile, tools: DownloadTools, *, is_safetensors: bool) -> None:
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
        """Wait until no thread reads the part."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


def drop_wrong(part: PartialFile, digests: Sequence[SpanDigest]) -> int:
    """Mark spans with a wrong digest as missing again; returns how many."""
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
        follow: Callable[[PartialFile], DownloadFollower] | None = None,
    ) -> None:
        """`follow` creates a follower that checks the bytes instead of the target's digests."""
        self._target = target
        self._tools = tools
        self._report = report
        self._meter = Meter()
        self._downloaded = 0
        self._source = ""
        self._follow = follow
        self._follower: DownloadFollower | None = None

    async def run(self) -> Downloaded:
        """A verified part, or one error with the reasons of all sources."""
        failures: list[FanlightError] = []
        for number, url in enumerate(self._target.urls):
            is_last = number == len(self._target.urls) - 1
            try:
                with names_source(url):
                    return await self._from_source(url, number, is_last=is_last)
            except (SourceFailed, WrongBytes, NotFound, TokenRefused) as error:
                log.warning("weights_source_failed", path=self._target.path, why=error.message, is_last=is_last)
                failures.append(error)
        raise combine_failures(self._target.reference, failures)

    async def _from_source(self, url: str, number: int, *, is_last: bool) -> Downloaded:
        """Restarts if the file changes at the source, or if bytes resumed from another source turn out wrong."""
        for attempt in range(MAX_RESTARTS):
            probe = self._tools.web.probe if attempt else self._tools.web.probed
            # Before the first byte, give up soon on a server that cannot be reached.
            retry = self._tools.retry if self._downloaded else self._tools.retry_probe
            remote = await retry(bind(probe, url))
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
        raise SourceFailed(f"{self._source} changed or sent wrong bytes {MAX_RESTARTS} times")

    def _check(self, remote: RemoteFile) -> Layout:
        target, host = self._target, remote.url.split("/")[2]
        if remote.size_bytes is None:
            raise SourceFailed(f"{host} sends no length")
        if target.size_bytes is not None and remote.size_bytes != target.size_bytes:
            raise WrongBytes(f"{host} has {remote.size_bytes} bytes instead of {target.size_bytes}")
        if target.sha256 and remote.sha256 and remote.sha256 != target.sha256:
            raise WrongBytes(f"{host} has a different file: sha256 {remote.sha256}")
        return Layout(segments=target.segments) if target.segments else whole_file_layout(remote.size_bytes)

    def _identity(self, remote: RemoteFile) -> str:
        """Without a digest, only bytes of the same version of the file may be combined."""
        if self._target.is_pinned:
            return f"{self._target.key}{self._target.form}"
        return f"{remote.url.split('?')[0]} {remote.etag}"

    def _open(self, layout: Layout, identity: str) -> PartialFile:
        there = self._tools.parts / f"{self._target.key}.part"
        allocated = there.stat().st_blocks * 512 if there.exists() else 0
        self._tools.reserve(max(0, layout.size - allocated))
        return PartialFile(self._tools.parts, self._target.key, size=layout.size, identity=identity)

    async def _fill(self, part: PartialFile, layout: Layout, url: str, remote: RemoteFile, *, is_last: bool) -> None:
        self._source, self._meter = remote.url.split("/")[2], Meter()
        self._follower = self._make_follower(part)
        if not self._target.is_pinned and not remote.etag and part.resumed_bytes:
            # There is no way to know whether it is still the same file.
            await self._tools.run(part.restart)
        if not remote.has_ranges:
            await self._stream(part, url, remote)
            return
        try:
            await self._parallel(part, layout, url, remote, is_last=is_last).run()
        except NoRanges:
            await self._stream(part, url, remote)

    def _parallel(
        self, part: PartialFile, layout: Layout, url: str, remote: RemoteFile, *, is_last: bool
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
            max_connections=limits.connections,
            max_piece_bytes=limits.piece_bytes,
            slow_bps=0 if is_last else limits.slow_bps,
            now_s=self._tools.now_s,
        )

    async def _stream(self, part: PartialFile, url: str, remote: RemoteFile) -> None:
        """Download from the first byte in one request, retried until complete."""
        if self._target.segments:
            raise SourceFailed(f"{self._source} does not support ranges, and only a part of the file is needed")

        async def once() -> None:
            async with self._tools.web.stream(url, remote) as blocks:
                await self.write(part, ByteSpan(0, part.map.size), blocks)

        while not part.map.is_complete:
            await self._tools.retry(once, lambda: part.map.done_bytes)

    async def write(self, part: PartialFile, span: ByteSpan, blocks: AsyncIterator[bytes]) -> None:
        """Write the arriving bytes of the span, except those already there; also those before a failure."""
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

    async def _flush(self, part: PartialFile, at: int, buffer: bytearray) -> int:
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
        self._report_progress(part, now_s)
        await self._tools.count(len(buffer))
        return end

    def _report_progress(self, part: PartialFile, now_s: float) -> None:
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

    async def back_off(self, failures: int, error: Transient) -> None:
        await self._tools.back_off(failures, error)

    def _make_follower(self, part: PartialFile) -> DownloadFollower | None:
        if self._follow is not None:
            return self._follow(part)
        if self._target.segments is not None:
            return None
        return StreamingHasher(part, self._tools, is_safetensors=self._target.path.endswith(".safetensors"))

    async def _verify(self, part: PartialFile, reported_sha256: str) -> Digested | None:
        """The digests of the part. WrongBytes, after wrong spans are dropped.

        Without a pinned sha256, the one that the source itself reports is compared.
        """
        digests = self._target.digests if self._follow is None else ()
        bad = await self._tools.run(drop_wrong, part, digests)
        if bad:
            raise WrongBytes(f"{self._source} sent {bad} of {len(digests)} chunks or tensors with wrong bytes")
        if self._follower is None:
            return None
        digested = await self._follower.finish()
        expected = self._target.sha256 or reported_sha256
        if digested and self._follow is None and expected and digested.sha256 != expected:
            raise WrongBytes(f"sha256 is {digested.sha256} instead of {expected} ({self._source})")
        return digested
