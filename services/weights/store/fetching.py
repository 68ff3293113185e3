"""From a planned file to objects in the store: small ones in one go, whole ones, and those made of tensors."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fanlight.errors import FailedPrecondition, FanlightError, NotFound
from services.kernel.logs import get_logger
from services.weights.errors import SourceFailed, TokenRefused, WrongBytes, tell
from services.weights.mirror.packing import StreamingUnpacker
from services.weights.planning.plan import FetchPlan, PlannedFile
from services.weights.planning.resolve import Resolver
from services.weights.planning.selection import PLAIN_FILE, Selection
from services.weights.references.manifest import ByteSpan, WeightFile
from services.weights.references.tensors import Digested
from services.weights.store.keeping import Link, ObjectWriter, digests_of, discard, key_of, layout_of
from services.weights.store.objects import Objects, locked
from services.weights.transfer.download import Download, Downloaded, DownloadProgress, DownloadTarget, SpanDigest
from services.weights.transfer.pacing import DownloadTools, Meter
from services.weights.transfer.partial import (
    RECORD_BYTES,
    ChunkMap,
    Layout,
    Partial,
    disk_errors,
    journal_of,
    of_spans,
    replay,
)
from services.weights.transfer.web import RemoteFile

LOOK_S = 0.5
SOURCE = "another asker"
MAX_HEAD_BYTES = 64 * 1024

log = get_logger()

# Smaller files come in one answer, without ranges and without a part on disk.
SMALL_BYTES = 1024 * 1024
MAX_SMALL_BYTES = 16 * 1024 * 1024


class DownloadWatcher:
    """`progress` is what is told of it, with the numbers left open."""

    def __init__(self, folder: Path, key: str, progress: DownloadProgress) -> None:
        self._journal = journal_of(folder, key)
        self._progress = replace(progress, source=SOURCE)
        self._meter = Meter()
        self._map: ChunkMap | None = None
        self._at = 0
        self._next_s = float("-inf")

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to look again."""
        if now_s < self._next_s:
            return False
        self._next_s = now_s + LOOK_S
        return True

    def look(self, now_s: float) -> DownloadProgress | None:
        """What is there now; None where nothing is known. Blocking, for as long as what is new of the journal takes."""
        before = self._map.done_bytes if self._map else None
        try:
            self._read()
        except (OSError, ValueError, KeyError, TypeError):
            self._map = None
        if self._map is None:
            return None
        done = self._map.done_bytes
        # What was there before the first look says nothing about the link.
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
class Placed:
    """Objects for links of a view, and what came over the link for them."""

    links: tuple[Link, ...]
    downloaded_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unpacked:
    """Bytes of a file that came in packed form, lying as `layout` says; `digested` where they are all of it."""

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
    _keeping: ObjectWriter = field(init=False)
    _has_come: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._keeping = ObjectWriter(objects=self.objects)

    async def fetch(self, plan: FetchPlan, item: PlannedFile, wish: Selection) -> Placed:
        """The file's objects, held from now on. One process fetches, the others wait for it."""
        key = key_of(item)
        seen: list[DownloadProgress] = []
        async with locked(self.objects.lock_of(f"fetch-{key}"), self._looking(plan, item, key, seen)):
            if held := await self.tools.run(self._keeping.held, item):
                self._report_held(plan, item, seen)
                return Placed(links=held)
            with disk_errors(f"{plan.manifest.reference} ({item.file.path})"):
                if item.tensors is not None:
                    return await self._fetch_tensors(plan, item, key)
                if item.size_bytes < SMALL_BYTES and not item.file.chunks and not item.frames:
                    return await self._fetch_small(plan, item, wish)
                return await self._fetch_whole(plan, item, wish, key)

    def _looking(
        self, plan: FetchPlan, item: PlannedFile, key: str, seen: list[DownloadProgress]
    ) -> Callable[[], Awaitable[None]]:
        """Who waits for another's download tells how that stands; `seen` gets the latest."""
        onlooker = DownloadWatcher(self.objects.parts, key, _progress(plan, item, size_bytes=0))

        async def look() -> None:
            now_s = self.tools.now_s()
            if onlooker.is_due(now_s) and (progress := await self.tools.run(onlooker.look, now_s)):
                seen[:] = [progress]
                self.report(progress)

        return look

    def _report_held(self, plan: FetchPlan, item: PlannedFile, seen: Sequence[DownloadProgress]) -> None:
        """Another asker has fetched the file, perhaps without a report: the planned bytes are all here now."""
        if seen:
            self.report(replace(seen[-1], done_bytes=seen[-1].total_bytes))
        elif item.fetch_bytes:
            self.report(_progress(plan, item, size_bytes=item.fetch_bytes, source=SOURCE))

    async def _urls(self, sources: Sequence[str]) -> tuple[str, ...]:
        if not sources:
            raise FailedPrecondition("a file is listed without a source", field="reference")
        return tuple([await self.resolver.address(source) for source in sources])

    async def _fetch_small(self, plan: FetchPlan, item: PlannedFile, wish: Selection) -> Placed:
        failures: list[FanlightError] = []
        for number, url in enumerate(await self._urls(item.file.sources)):
            try:
                body, remote = await self._small_body(url, item.file)
            except (SourceFailed, WrongBytes, NotFound, TokenRefused) as error:
                failures.append(error)
                continue
            await self.tools.count(len(body))
            path, digested = await self.tools.run(self._keeping.written, item, body)
            got = Downloaded(path=path, digested=digested, source=number, etag=remote.etag, downloaded_bytes=len(body))
            placed = await self._keep(plan, item, wish, got)
            self.report(_progress(plan, item, size_bytes=len(body), source=remote.url.split("/")[2]))
            return placed
        raise tell(f"{plan.manifest.reference} ({item.file.path})", failures)

    async def _small_body(self, url: str, file: WeightFile) -> tuple[bytes, RemoteFile]:
        # Before anything has come nobody knows whether anybody is there.
        patience = self.tools.retry if self._has_come or self.tools.link.has_begun else self.tools.retry_probe
        body, remote = await patience(lambda: self.tools.web.body(url, limit_bytes=MAX_SMALL_BYTES))
        self._has_come = True
        if remote.size_bytes is not None and len(body) != remote.size_bytes:
            raise SourceFailed(f"sent {len(body)} of {remote.size_bytes} bytes")
        if file.is_exact and len(body) != file.size_bytes:
            raise WrongBytes(f"{file.path} has {len(body)} bytes instead of {file.size_bytes}")
        sha256 = hashlib.sha256(body).hexdigest()
        if file.sha256 and sha256 != file.sha256:
            raise WrongBytes(f"{file.path}: sha256 is {sha256} instead of {file.sha256}")
        return body, remote

    async def _fetch_whole(self, plan: FetchPlan, item: PlannedFile, wish: Selection, key: str) -> Placed:
        file = item.file
        unpacked = await self._fetch_packed(plan, item, key)
        if unpacked is not None and unpacked.digested is not None:
            if unpacked.digested.sha256 == file.sha256:
                return await self._keep(plan, item, wish, unpacked.as_downloaded(unpacked.digested))
            log.warning("weights_mirror_wrong", path=file.path, sha256=unpacked.digested.sha256)
            await self.tools.run(discard, unpacked.path)
        # An address that pins nothing has the size that it has when it is fetched.
        is_known = file.is_exact and (file.sha256 or plan.manifest.kind != PLAIN_FILE)
        target = DownloadTarget(
            reference=plan.manifest.reference,
            path=file.path,
            key=key,
            urls=await self._urls(file.sources),
            size_bytes=file.size_bytes if is_known else None,
            sha256=file.sha256,
            digests=_chunk_digests(file),
        )
        return await self._keep(plan, item, wish, await Download(target, self.tools, self.report).run())

    async def _keep(self, plan: FetchPlan, item: PlannedFile, wish: Selection, got: Downloaded) -> Placed:
        """What was downloaded becomes an object, or several where a checkpoint is kept as its parts."""
        file, digested = item.file, got.digested
        assert digested is not None
        sha256 = await self.tools.run(self._keeping.whole, plan, item, got.path, digested)
        if got.source is not None:
            source = file.sources[got.source]
            await self.tools.run(self.objects.index.remember_source, source, sha256, got.etag)
        named = replace(item, file=replace(file, sha256=digested.sha256))
        parts = await self.tools.run(self._keeping.split, plan, named, wish, key_of(item))
        return Placed(links=parts or ((item.link, sha256),), downloaded_bytes=got.downloaded_bytes)

    async def _fetch_tensors(self, plan: FetchPlan, item: PlannedFile, key: str) -> Placed:
        layout = layout_of(item)
        if not layout.size:
            sha256 = await self.tools.run(self._keeping.composed, item, None, layout, key)
            return Placed(links=((item.link, sha256),))
        unpacked = await self._fetch_packed(plan, item, key)
        try:
            if unpacked is not None:
                return await self._compose_from(item, unpacked.path, unpacked.layout, unpacked.downloaded_bytes)
        except WrongBytes as error:
            log.warning("weights_mirror_wrong", path=item.link, why=error.message)
        file = item.file
        target = DownloadTarget(
            reference=plan.manifest.reference,
            path=item.link,
            key=key,
            urls=await self._urls(file.sources),
            size_bytes=file.size_bytes if file.is_exact else None,
            segments=layout.segments,
            digests=digests_of(item, layout),
        )
        got = await Download(target, self.tools, self.report).run()
        return await self._compose_from(item, got.path, layout, got.downloaded_bytes)

    async def _compose_from(self, item: PlannedFile, fetched: Path, layout: Layout, downloaded_bytes: int) -> Placed:
        try:
            sha256 = await self.tools.run(self._keeping.composed, item, fetched, layout, key_of(item))
        finally:
            await self.tools.run(discard, fetched)
        return Placed(links=((item.link, sha256),), downloaded_bytes=downloaded_bytes)

    async def _fetch_packed(self, plan: FetchPlan, item: PlannedFile, key: str) -> "_Unpacked | None":
        """The wanted bytes out of a mirror's packed form; None where no mirror gives them."""
        packed, frames = item.file.packed, item.frames
        if packed is None or not frames:
            return None
        places = of_spans(frame.packed for frame in frames)
        is_whole = len(frames) == len(packed.frames)
        target = DownloadTarget(
            reference=plan.manifest.reference,
            path=item.link,
            key=key,
            urls=await self._urls(packed.sources),
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

        def follow(part: Partial) -> StreamingUnpacker:
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
        layout = of_spans(frame.span for frame in frames)
        return _Unpacked(path=out, layout=layout, digested=got.digested, downloaded_bytes=got.downloaded_bytes)


def _progress(plan: FetchPlan, item: PlannedFile, *, size_bytes: int, source: str = "") -> DownloadProgress:
    """All of `size_bytes` of the file are here."""
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
