"""From planned files to objects in the store: small files, whole files, and files composed of tensors.

Single flight: of all processes that need the same bytes, one downloads and the others wait and report its progress.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from fanlight.errors import FailedPrecondition, FanlightError, NotFound
from services.kernel.logs import get_logger
from services.weights.errors import (
    SourceFailed,
    TokenRefused,
    WrongBytes,
    blame_source,
    combine_failures,
    disk_errors,
)
from services.weights.mirror.packing import StreamingUnpacker
from services.weights.planning.plan import FetchPlan, PlannedFile
from services.weights.planning.resolve import Resolver
from services.weights.planning.selection import PLAIN_FILE, Selection
from services.weights.references.manifest import ByteSpan, WeightFile
from services.weights.references.tensors import BadHeader, Digested, FileDigests
from services.weights.store.keeping import Link, ObjectWriter, discard, key_of, missing_digests, missing_layout
from services.weights.store.locks import locked
from services.weights.store.objects import Objects
from services.weights.transfer.answers import RemoteFile
from services.weights.transfer.download import Download, Downloaded, DownloadProgress, DownloadTarget, SpanDigest
from services.weights.transfer.gate import HEAD_BYTES, TAIL_BYTES, is_text, page_in, refuse_foreign, refuse_unsound
from services.weights.transfer.pacing import DownloadTools, Meter
from services.weights.transfer.partial import (
    RECORD_BYTES,
    ChunkMap,
    Layout,
    PartialFile,
    journal_of,
    layout_of_spans,
    replay,
)

log = get_logger()

POLL_S = 0.5
# The `source` of progress while another process or task downloads the file.
SOURCE = "another download"
MAX_HEAD_BYTES = 64 * 1024
# Smaller files are downloaded in one response, without ranges and without a part on disk.
SMALL_BYTES = 1024 * 1024
MAX_SMALL_BYTES = 16 * 1024 * 1024


class DownloadWatcher:
    """Progress of another process's download of the same bytes, read from its journal.

    `progress`: a template for the reports; its numbers are replaced.
    """

    def __init__(self, folder: Path, key: str, progress: DownloadProgress) -> None:
        self._journal = journal_of(folder, key)
        self._progress = replace(progress, source=SOURCE)
        self._meter = Meter()
        self._map: ChunkMap | None = None
        self._at = 0
        self._next_s = float("-inf")

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to poll again."""
        if now_s < self._next_s:
            return False
        self._next_s = now_s + POLL_S
        return True

    def poll(self, now_s: float) -> DownloadProgress | None:
        """The progress now; None if unknown. Blocks while new journal records are read."""
        before = self._map.done_bytes if self._map else None
        try:
            self._read()
        except (OSError, ValueError, KeyError, TypeError):
            self._map = None
        if self._map is None:
            return None
        done = self._map.done_bytes
        # Bytes from before the first poll say nothing about the link.
        self._meter.count(max(0, done - before) if before is not None else 0, now_s)
        return replace(
            self._progress,
            done_bytes=done,
            total_bytes=self._map.size,
            bytes_per_s=self._meter.bytes_per_s(now_s),
        )

    def _read(self) -> None:
        with self._journal.open("rb") as file:
            if self._map is None or file.seek(0, 2) < self._at:
                file.seek(0)
                head = file.readline(MAX_HEAD_BYTES)
                self._map, self._at = ChunkMap(int(json.loads(head)["size"])), len(head)
            file.seek(self._at)
            data = file.read()
        for at in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
            if not replay(self._map, data[at : at + RECORD_BYTES]):
                return
            self._at += RECORD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedFile:
    """The links of one file in a view and their objects, and the bytes downloaded for them."""

    links: tuple[Link, ...]
    downloaded_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unpacked:
    """Unpacked bytes of a file, arranged as `layout`; `digested` is set if they are the whole file."""

    path: Path
    layout: Layout
    digested: Digested | None
    downloaded_bytes: int

    def as_downloaded(self, digested: Digested) -> Downloaded:
        return Downloaded(
            path=self.path, digested=digested, source=None, etag="", downloaded_bytes=self.downloaded_bytes
        )


@dataclass(slots=True, kw_only=True)
class FileFetcher:
    objects: Objects
    tools: DownloadTools
    resolver: Resolver
    report: Callable[[DownloadProgress], None]
    _writer: ObjectWriter = field(init=False)
    _has_received: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._writer = ObjectWriter(objects=self.objects)

    async def fetch(self, plan: FetchPlan, item: PlannedFile, selection: Selection) -> PlacedFile:
        """Fetch the file's objects unless they are held. Single flight: one process downloads, the others wait."""
        key = key_of(item)
        seen: list[DownloadProgress] = []
        async with locked(self.objects.lock_of(f"fetch-{key}"), self._watching(plan, item, key, seen)):
            if held := await self.tools.run(self._writer.find, item):
                self._report_held(plan, item, seen)
                return PlacedFile(links=held)
            with disk_errors(f"{plan.manifest.reference} ({item.file.path})"):
                if item.tensors is not None:
                    return await self._fetch_tensors(plan, item, key)
                if _is_small(item):
                    return await self._fetch_small(plan, item, selection)
                return await self._fetch_whole(plan, item, selection, key)

    def _watching(
        self, plan: FetchPlan, item: PlannedFile, key: str, seen: list[DownloadProgress]
    ) -> Callable[[], Awaitable[None]]:
        """A callback that reports another process's download while we wait for it; `seen` gets the latest report."""
        watcher = DownloadWatcher(self.objects.parts, key, _progress(plan, item, size_bytes=0))

        async def poll() -> None:
            now_s = self.tools.now_s()
            if watcher.is_due(now_s) and (progress := await self.tools.run(watcher.poll, now_s)):
                seen[:] = [progress]
                self.report(progress)

        return poll

    def _report_held(self, plan: FetchPlan, item: PlannedFile, seen: Sequence[DownloadProgress]) -> None:
        """Another process or task fetched the file, perhaps without any report: all planned bytes are here now."""
        if seen:
            self.report(replace(seen[-1], done_bytes=seen[-1].total_bytes))
        elif item.fetch_bytes:
            self.report(_progress(plan, item, size_bytes=item.fetch_bytes, source=SOURCE))

    async def _urls(self, sources: Sequence[str]) -> tuple[str, ...]:
        if not sources:
            raise FailedPrecondition("a file has no source", field="reference")
        return tuple([await self.resolver.address(source) for source in sources])

    def _renewing(self, sources: Sequence[str]) -> Callable[[int], Awaitable[str]]:
        async def renew(number: int) -> str:
            return await self.resolver.address(sources[number])

        return renew

    async def _fetch_small(self, plan: FetchPlan, item: PlannedFile, selection: Selection) -> PlacedFile:
        failures: list[FanlightError] = []
        for number, url in enumerate(await self._urls(item.file.sources)):
            try:
                body, remote = await self._small_body(url, item.file)
            except (SourceFailed, WrongBytes, NotFound, TokenRefused, BadHeader) as error:
                blame_source(error, urlsplit(url).hostname or "")
                failures.append(error)
                continue
            await self.tools.count(len(body))
            path, digested = await self.tools.run(self._writer.write_small, item, body)
            got = Downloaded(path=path, digested=digested, source=number, etag=remote.etag, downloaded_bytes=len(body))
            placed = await self._keep(plan, item, selection, got)
            self.report(_progress(plan, item, size_bytes=len(body), source=remote.url.split("/")[2]))
            return placed
        raise combine_failures(f"{plan.manifest.reference} ({item.file.path})", failures)

    async def _small_body(self, url: str, file: WeightFile) -> tuple[bytes, RemoteFile]:
        # Before the first byte, give up soon on a server that cannot be reached.
        retry = self.tools.retry if self._has_received or self.tools.link.has_begun else self.tools.retry_probe
        body, remote = await retry(lambda: self.tools.web.body(url, limit_bytes=MAX_SMALL_BYTES))
        self._has_received = True
        sha256 = hashlib.sha256(body).hexdigest()
        if sha256 == file.sha256:
            return body, remote
        may_be_empty = file.is_exact and is_text(file.path)
        if page_in(body[:HEAD_BYTES]) or not (file.sha256 or (may_be_empty and not body)):
            refuse_foreign(body[:HEAD_BYTES], len(body), name=file.path, url=url)
        if remote.size_bytes is not None and len(body) != remote.size_bytes:
            raise SourceFailed(f"sent {len(body)} of {remote.size_bytes} bytes")
        if file.is_exact and len(body) != file.size_bytes:
            raise WrongBytes(f"{file.path} has {len(body)} bytes instead of {file.size_bytes}")
        if file.sha256:
            raise WrongBytes(f"{file.path}: sha256 is {sha256} instead of {file.sha256}")
        _refuse_unsound_small(body, file.path, host=urlsplit(url).hostname or "")
        return body, remote

    async def _fetch_whole(self, plan: FetchPlan, item: PlannedFile, selection: Selection, key: str) -> PlacedFile:
        file = item.file
        unpacked = await self._fetch_packed(plan, item, key)
        if unpacked is not None and unpacked.digested is not None:
            if unpacked.digested.sha256 == file.sha256:
                return await self._keep(plan, item, selection, unpacked.as_downloaded(unpacked.digested))
            log.warning("weights_mirror_wrong_bytes", path=file.path, sha256=unpacked.digested.sha256)
            await self.tools.run(discard, unpacked.path)
        # An address without a digest has whatever size it has at the time of the fetch.
        is_known = file.is_exact and (file.sha256 or plan.manifest.kind != PLAIN_FILE)
        target = DownloadTarget(
            reference=plan.manifest.reference,
            path=file.path,
            key=key,
            urls=await self._urls(file.sources),
            renew=self._renewing(file.sources),
            size_bytes=file.size_bytes if is_known else None,
            sha256=file.sha256,
            digests=_chunk_digests(file),
        )
        return await self._keep(plan, item, selection, await Download(target, self.tools, self.report).run())

    async def _keep(self, plan: FetchPlan, item: PlannedFile, selection: Selection, got: Downloaded) -> PlacedFile:
        """Store the download as an object, or as several if a checkpoint is split into its parts."""
        file, digested = item.file, got.digested
        assert digested is not None
        sha256 = await self.tools.run(self._writer.publish_file, plan, item, got.path, digested)
        if got.source is not None:
            source = file.sources[got.source]
            await self.tools.run(self.objects.index.remember_source, source, sha256, got.etag)
        named = replace(item, file=replace(file, sha256=digested.sha256))
        parts = await self.tools.run(self._writer.split, plan, named, selection, key_of(item))
        return PlacedFile(links=parts or ((item.link, sha256),), downloaded_bytes=got.downloaded_bytes)

    async def _fetch_tensors(self, plan: FetchPlan, item: PlannedFile, key: str) -> PlacedFile:
        layout = missing_layout(item)
        if not layout.size:
            sha256 = await self.tools.run(self._writer.publish_composed, item, None, layout, key)
            return PlacedFile(links=((item.link, sha256),))
        unpacked = await self._fetch_packed(plan, item, key)
        try:
            if unpacked is not None:
                return await self._compose_from(item, unpacked.path, unpacked.layout, unpacked.downloaded_bytes)
        except WrongBytes as error:
            log.warning("weights_mirror_wrong_bytes", path=item.link, why=error.message)
        file = item.file
        target = DownloadTarget(
            reference=plan.manifest.reference,
            path=item.link,
            key=key,
            urls=await self._urls(file.sources),
            renew=self._renewing(file.sources),
            size_bytes=file.size_bytes if file.is_exact else None,
            segments=layout.segments,
            digests=missing_digests(item, layout),
        )
        got = await Download(target, self.tools, self.report).run()
        return await self._compose_from(item, got.path, layout, got.downloaded_bytes)

    async def _compose_from(
        self, item: PlannedFile, fetched: Path, layout: Layout, downloaded_bytes: int
    ) -> PlacedFile:
        try:
            sha256 = await self.tools.run(self._writer.publish_composed, item, fetched, layout, key_of(item))
        finally:
            await self.tools.run(discard, fetched)
        return PlacedFile(links=((item.link, sha256),), downloaded_bytes=downloaded_bytes)

    async def _fetch_packed(self, plan: FetchPlan, item: PlannedFile, key: str) -> "_Unpacked | None":
        """Download the needed bytes in packed form from a mirror; None if no mirror delivers them."""
        packed, frames = item.file.packed, item.frames
        if packed is None or not frames:
            return None
        places = layout_of_spans(frame.packed for frame in frames)
        is_whole = len(frames) == len(packed.frames)
        target = DownloadTarget(
            reference=plan.manifest.reference,
            path=item.link,
            key=key,
            urls=await self._urls(packed.sources),
            renew=self._renewing(packed.sources),
            size_bytes=packed.size_bytes,
            segments=None if is_whole else places.segments,
            digests=tuple(
                SpanDigest(span=ByteSpan(at, at + len(frame.packed)), sha256=frame.sha256)
                for frame in frames
                for at in [places.to_download(frame.packed.begin)]
            ),
            form=" packed",
        )
        out = self.objects.parts / f"{key}.raw"
        is_safetensors = item.file.path.endswith(".safetensors") if is_whole else None

        def follow(part: PartialFile) -> StreamingUnpacker:
            return StreamingUnpacker(part, self.tools, frames, out, is_safetensors=is_safetensors)

        await self.tools.run(self.objects.reserve, sum(len(frame.span) for frame in frames))
        try:
            got = await Download(target, self.tools, self.report, follow=follow).run()
        except (SourceFailed, WrongBytes, NotFound, TokenRefused) as error:
            if not item.file.sources:
                raise
            log.warning("weights_mirror_failed", path=item.link, why=error.message)
            await self.tools.run(discard, out)
            return None
        await self.tools.run(discard, got.path)
        layout = layout_of_spans(frame.span for frame in frames)
        return _Unpacked(path=out, layout=layout, digested=got.digested, downloaded_bytes=got.downloaded_bytes)


def _is_small(item: PlannedFile) -> bool:
    """Whether it comes in one answer. A file whose size nobody knows may be large."""
    is_known = item.size_bytes > 0 or item.file.is_exact
    return is_known and item.size_bytes < SMALL_BYTES and not item.file.chunks and not item.frames


def _refuse_unsound_small(body: bytes, name: str, *, host: str) -> None:
    digests = FileDigests(size_bytes=len(body), is_safetensors=name.endswith(".safetensors"))
    digests.update(body)
    fault = digests.finish().fault
    header_fault = fault.message if fault else ""
    refuse_unsound(body[:HEAD_BYTES], body[-TAIL_BYTES:], name=name, host=host, header_fault=header_fault)


def _progress(plan: FetchPlan, item: PlannedFile, *, size_bytes: int, source: str = "") -> DownloadProgress:
    """Progress of a file with all `size_bytes` done."""
    return DownloadProgress(
        reference=plan.manifest.reference,
        path=item.link if item.tensors is not None or item.frames else item.file.path,
        done_bytes=size_bytes,
        total_bytes=size_bytes,
        bytes_per_s=0.0,
        source=source,
    )


def _chunk_digests(file: WeightFile) -> tuple[SpanDigest, ...]:
    if file.chunks is None:
        return ()
    step, shas = file.chunks.chunk_bytes, file.chunks.sha256s
    spans = [ByteSpan(at, min(at + step, file.size_bytes)) for at in range(0, file.size_bytes, step)]
    if len(spans) != len(shas):
        raise FailedPrecondition(f"{file.path}: {len(shas)} chunk digests for {len(spans)} chunks", field="manifest")
    return tuple(SpanDigest(span=span, sha256=sha) for span, sha in zip(spans, shas, strict=True))
