"""Download one file from one of its sources: parallel ranges, resume, digests checked. Knows no manifest, no store."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from fanlight.errors import FanlightError, NotFound
from services.kernel.logs import get_logger
from services.weights.errors import (
    ForeignAnswer,
    NoRanges,
    RequestRefused,
    SourceChanged,
    SourceFailed,
    TokenRefused,
    Transient,
    WrongBytes,
    blame_source,
    combine_failures,
)
from services.weights.references.manifest import ByteSpan
from services.weights.references.tensors import BadHeader, Digested
from services.weights.transfer.answers import RemoteFile
from services.weights.transfer.following import DownloadFollower, StreamingHasher
from services.weights.transfer.gate import HEAD_BYTES, TAIL_BYTES, refuse_foreign, refuse_unsound
from services.weights.transfer.pacing import DownloadTools, Meter
from services.weights.transfer.parallel import ParallelDownload
from services.weights.transfer.partial import FileSegment, Layout, PartialFile, whole_file_layout

log = get_logger()

FLUSH_BYTES = 256 * 1024
MAX_RESTARTS = 3
# Room for a file of unknown length is made step by step.
GROW_BYTES = 4 * 1024 * 1024


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
    # The address of a source again, by its index; where it is signed, signed anew.
    renew: Callable[[int], Awaitable[str]] | None = None

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
        self._number, self._url = 0, ""
        self._follow = follow
        self._follower: DownloadFollower | None = None
        # The progress reported last.
        self._done_bytes = self._total_bytes = 0

    async def run(self) -> Downloaded:
        """A verified part, or one error with the reasons of all sources."""
        failures: list[FanlightError] = []
        for number, url in enumerate(self._target.urls):
            self._number, self._url = number, url
            is_last = number == len(self._target.urls) - 1
            try:
                return await self._from_source(is_last=is_last)
            except (SourceFailed, WrongBytes, NotFound, TokenRefused, BadHeader) as error:
                log.warning("weights_source_failed", path=self._target.path, why=error.message, is_last=is_last)
                blame_source(error, urlsplit(url).hostname or "")
                failures.append(error)
        raise combine_failures(self._target.reference, failures)

    async def _from_source(self, *, is_last: bool) -> Downloaded:
        """Restarts if the file changes at the source, or if bytes resumed from another source turn out wrong."""
        for attempt in range(MAX_RESTARTS):
            remote = self._check(await self._first_answer(is_again=attempt > 0))
            # Where versions cannot be told from each other, only the bytes of one answer belong together.
            may_join = remote.is_pinned or (bool(remote.validator) and attempt < MAX_RESTARTS - 1)
            remote = remote if may_join else replace(remote, validator="")
            if remote.size_bytes is None:
                try:
                    return await self._unsized(remote, may_join=may_join)
                except SourceChanged:
                    continue
            layout = self._layout(remote.size_bytes)
            part = await self._tools.run(self._open, layout, self._identity(remote))
            try:
                await self._fill(part, layout, remote, is_last=is_last, may_join=may_join)
                return self._done(part, await self._verify(part, remote), remote)
            except SourceChanged:
                await self._tools.run(part.restart)
            except WrongBytes:
                if not self._target.digests:
                    await self._tools.run(part.restart)
                if part.resumed_bytes == 0 and not (self._target.digests and attempt == 0):
                    raise
            except (BadHeader, ForeignAnswer):
                await self._tools.run(part.discard)
                raise
            finally:
                await self._stop_follower()
                part.close()
        raise SourceFailed(f"{self._source} changed or sent wrong bytes {MAX_RESTARTS} times")

    async def _first_answer(self, *, is_again: bool) -> RemoteFile:
        target, web = self._target, self._tools.web

        async def ask() -> RemoteFile:
            probe = web.probe if is_again else web.probed
            return await probe(self._url, name=target.path, is_pinned=target.is_pinned)

        # Before the first byte, give up soon on a server that cannot be reached.
        retry = self._tools.retry if self._downloaded else self._tools.retry_probe
        self._source = _place_of(await self.renew() if is_again else self._url)
        return await retry(ask, waits_until=self._report_wait)

    def _done(self, part: PartialFile, digested: Digested | None, remote: RemoteFile) -> Downloaded:
        return Downloaded(
            path=part.path,
            digested=digested,
            source=self._number,
            etag=remote.etag,
            downloaded_bytes=self._downloaded,
        )

    def _check(self, remote: RemoteFile) -> RemoteFile:
        """The answer with the size that the target knows, if the server says none."""
        target, host = self._target, _place_of(remote.url)
        if remote.size_bytes is None:
            return replace(remote, size_bytes=target.size_bytes)
        if target.size_bytes is not None and remote.size_bytes != target.size_bytes:
            raise WrongBytes(f"{host} has {remote.size_bytes} bytes instead of {target.size_bytes}")
        if not target.is_pinned and not remote.size_bytes and target.size_bytes is None:
            refuse_foreign(b"", 0, name=target.path, url=self._url)
        # A digest that the source says pins the bytes as well as one of the target.
        return replace(remote, is_pinned=target.is_pinned or bool(remote.sha256))

    def _layout(self, size_bytes: int) -> Layout:
        segments = self._target.segments
        return Layout(segments=segments) if segments else whole_file_layout(size_bytes)

    def _identity(self, remote: RemoteFile) -> str:
        """Without a digest, only bytes of the same version of the file may be combined."""
        if self._target.is_pinned:
            return f"{self._target.key}{self._target.form}"
        return remote.sha256 or f"{remote.url.split('?')[0]} {remote.validator}"

    def _open(self, layout: Layout, identity: str) -> PartialFile:
        there = self._tools.parts / f"{self._target.key}.part"
        allocated = there.stat().st_blocks * 512 if there.exists() else 0
        self._tools.reserve(max(0, layout.size - allocated))
        return PartialFile(self._tools.parts, self._target.key, size=layout.size, identity=identity)

    async def _fill(
        self, part: PartialFile, layout: Layout, remote: RemoteFile, *, is_last: bool, may_join: bool
    ) -> None:
        self._source, self._meter = _place_of(remote.url), Meter()
        self._follower = self._make_follower(part)
        if not may_join and part.resumed_bytes:
            await self._tools.run(part.restart)
        if not remote.has_ranges or not may_join:
            await self._stream(part, remote, may_join=may_join)
            return
        try:
            await self._parallel(part, layout, remote, is_last=is_last).run()
        except NoRanges:
            await self._stream(part, remote, may_join=may_join)

    def _parallel(self, part: PartialFile, layout: Layout, remote: RemoteFile, *, is_last: bool) -> ParallelDownload:
        limits = self._tools.limits
        return ParallelDownload(
            writer=self,
            part=part,
            layout=layout,
            web=self._tools.web,
            url=self._url,
            remote=remote,
            meter=self._meter,
            max_connections=limits.connections,
            max_piece_bytes=limits.piece_bytes,
            slow_bps=0 if is_last else limits.slow_bps,
            now_s=self._tools.now_s,
        )

    async def _stream(self, part: PartialFile, remote: RemoteFile, *, may_join: bool) -> None:
        """Download from the first byte in one request, retried until complete."""
        if self._target.segments:
            raise SourceFailed(f"{self._source} does not support ranges, and only a part of the file is needed")

        async def once() -> None:
            if not may_join:
                await self._start_over(part)
            async with self._tools.web.stream(self._url, remote) as blocks:
                await self.write(part, ByteSpan(0, part.map.size), blocks)

        while not part.map.is_complete:
            await self._retry_signed(once, lambda: part.map.done_bytes if may_join else 0)

    async def _start_over(self, part: PartialFile) -> None:
        await self._stop_follower()
        await self._tools.run(part.restart)
        self._follower = self._make_follower(part)

    async def _stop_follower(self) -> None:
        if self._follower:
            await self._follower.stop()

    async def _unsized(self, remote: RemoteFile, *, may_join: bool) -> Downloaded:
        """A file whose length neither the source nor the target knows, in order."""
        self._source, self._meter = _place_of(remote.url), Meter()
        if self._target.segments or self._follow:
            raise SourceFailed(f"{self._source} sends no length, and only a part of the file is needed")
        part = PartialFile(self._tools.parts, self._target.key, size=None, identity=self._identity(remote))
        try:
            await self._stream_unsized(part, remote, may_join=may_join)
            self._follower = self._make_follower(part)
            done = self._done(part, await self._verify(part, remote), remote)
            await self._tools.run(part.forget)
            # Of an earlier attempt at a source that said a length.
            await self._tools.run(self._drop_sized)
            return done
        except (SourceChanged, WrongBytes, BadHeader, ForeignAnswer):
            await self._tools.run(part.discard)
            raise
        finally:
            await self._stop_follower()
            part.close()

    def _drop_sized(self) -> None:
        there = self._tools.parts / f"{self._target.key}.part"
        there.unlink(missing_ok=True)
        there.with_suffix(".map").unlink(missing_ok=True)

    async def _stream_unsized(self, part: PartialFile, remote: RemoteFile, *, may_join: bool) -> None:
        async def once() -> None:
            if not may_join:
                await self._tools.run(part.restart)
            begin = part.map.size if remote.has_ranges else 0
            async with self._tools.web.stream(self._url, remote, begin) as blocks:
                await self.write(part, ByteSpan(begin, part.map.size), blocks)

        await self._retry_signed(once, lambda: part.map.size if may_join else 0)

    async def _retry_signed(self, once: Callable[[], Awaitable[None]], done_bytes: Callable[[], int]) -> None:
        """Retry, and sign an address again that ran out."""

        async def attempt() -> None:
            url = self._url
            try:
                await once()
            except (TokenRefused, NotFound, RequestRefused) as error:
                if await self.renew() == url:
                    raise
                raise Transient(error.message).of_part(error.part) from error

        await self._tools.retry(attempt, done_bytes, waits_until=self._report_wait)

    async def renew(self) -> str:
        if self._target.renew is not None:
            self._url = await self._target.renew(self._number)
        return self._url

    async def probe(self, url: str) -> RemoteFile:
        target, web = self._target, self._tools.web
        return await self._tools.retry(
            lambda: web.probe(url, name=target.path, is_pinned=target.is_pinned), waits_until=self._report_wait
        )

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
        if part.is_growing:
            await self._make_room(part, end)
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

    async def _make_room(self, part: PartialFile, end: int) -> None:
        if part.map.size // GROW_BYTES < end // GROW_BYTES or not part.map.size:
            await self._tools.run(self._tools.reserve, GROW_BYTES)
        part.grow(end)

    def _report_progress(self, part: PartialFile, now_s: float) -> None:
        self._done_bytes, self._total_bytes = part.map.done_bytes, part.map.size
        self._send_report(self._source, self._meter.bytes_per_s(now_s))

    def _report_wait(self, until_s: float) -> None:
        until = datetime.fromtimestamp(until_s, UTC)
        self._send_report(f"{self._source}, which asks to wait until {until:%H:%M:%S} UTC", 0.0)

    def _send_report(self, source: str, bytes_per_s: float) -> None:
        target = self._target
        self._report(
            DownloadProgress(
                reference=target.reference,
                path=target.path,
                done_bytes=self._done_bytes,
                total_bytes=self._total_bytes or target.size_bytes or 0,
                bytes_per_s=bytes_per_s,
                source=source,
            )
        )

    async def back_off(self, failures: int, error: Transient) -> None:
        await self._tools.back_off(failures, error, self._report_wait)

    def _make_follower(self, part: PartialFile) -> DownloadFollower | None:
        if self._follow is not None:
            return self._follow(part)
        if self._target.segments is not None:
            return None
        return StreamingHasher(part, self._tools, is_safetensors=self._target.path.endswith(".safetensors"))

    async def _verify(self, part: PartialFile, remote: RemoteFile) -> Digested | None:
        """The digests of the part. WrongBytes, after wrong spans are dropped.

        Without a pinned sha256, the one that the source itself reports is compared; without that one, the gate judges.
        """
        digests = self._target.digests if self._follow is None else ()
        bad = await self._tools.run(drop_wrong, part, digests)
        if bad:
            raise WrongBytes(f"{self._source} sent {bad} of {len(digests)} chunks or tensors with wrong bytes")
        if self._follower is None:
            return None
        digested = await self._follower.finish()
        expected = self._target.sha256 or remote.sha256
        if digested is None or self._follow is not None:
            return digested
        if expected and digested.sha256 != expected:
            raise WrongBytes(f"sha256 is {digested.sha256} instead of {expected} ({self._source})")
        if not expected and not self._target.is_pinned:
            await self._tools.run(self._pass_gate, part, digested)
        return digested

    def _pass_gate(self, part: PartialFile, digested: Digested) -> None:
        """ForeignAnswer or BadHeader if the bytes are not what the file's name promises. Blocking."""
        size, target = part.map.size, self._target
        head, tail_at = part.read(0, HEAD_BYTES), max(0, size - TAIL_BYTES)
        # A repository may list an empty file.
        if size or target.size_bytes is None:
            refuse_foreign(head, size, name=target.path, url=self._url)
        fault = digested.fault.message if digested.fault else ""
        tail = part.read(tail_at, TAIL_BYTES)
        refuse_unsound(head, tail, name=target.path, host=self._source, header_fault=fault)


def _place_of(url: str) -> str:
    """Host and port, for progress and errors."""
    return url.split("/")[2]
