"""The cache of control images, by request, image bytes, and annotator version and device.

Bounded by bytes and count, with eviction of the least recently used (LRU).
"""

import contextlib
import hashlib
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fanlight.errors import AlreadyExists, Conflict, FanlightError
from services.gateway.app.records import Codec, Records
from services.gateway.domain.job import Output, StageRequest
from services.gateway.domain.workers import AnnouncedAnnotator
from services.gateway.ports import CaughtUp, Clock, Deleted, Record
from services.kernel.blobs import BlobInfo, BlobStore

# The heap is rebuilt when it has so many more stale uses than entries.
STALE_LIMIT = 1_000
BUCKET = "control_images"
USE_WRITE_INTERVAL_S = 600.0
PURGE_PAGE = 1_000


@dataclass(frozen=True, slots=True, order=True)
class LastUse:
    time_s: float
    # Of two at the same time the one noted first is the older.
    number: int
    key: str


class LruIndex:
    """The bytes and the last use of each cache entry, on the wall clocks of several gateways. Pure."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._last: dict[str, LastUse] = {}
        self._heap: list[LastUse] = []
        self._noted = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._last)

    def note(self, key: str, size_bytes: int, used_s: float) -> None:
        """The entry exists and was used at that time, or later."""
        last = self._last.get(key)
        if last is not None and last.time_s > used_s:
            used_s = last.time_s
        self.size_bytes += size_bytes - self._sizes.get(key, 0)
        self._sizes[key] = size_bytes
        self._noted += 1
        self._last[key] = LastUse(used_s, self._noted, key)
        heapq.heappush(self._heap, self._last[key])
        if len(self._heap) > 2 * len(self._last) + STALE_LIMIT:
            self._heap = list(self._last.values())
            heapq.heapify(self._heap)

    def drop(self, key: str) -> None:
        self._last.pop(key, None)
        self.size_bytes -= self._sizes.pop(key, 0)

    def oldest(self) -> LastUse:
        """The last use of the least recently used entry; there must be one."""
        while self._last.get(self._heap[0].key) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedImage:
    blob: BlobInfo
    width_px: int
    height_px: int
    # On the wall clock; may lag by `USE_WRITE_INTERVAL_S`.
    used_s: float = 0.0
    # The id of the node that made it; empty if unknown.
    node: str = ""
    # Digests of the images that it was made of, in the same scope; none in records of an older Fanlight.
    sources: tuple[str, ...] = ()


IMAGES: Codec[CachedImage] = Codec(CachedImage)


def cache_key(request: StageRequest, annotator: AnnouncedAnnotator) -> str:
    """Equal for equal messages, which name their image by digest, and equal code on an equal device."""
    parts = [request.stage, request.message.hex(), annotator.version, annotator.device]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFigures:
    entries: int
    size_bytes: int
    budget_bytes: int
    # Since this gateway started.
    hits: int
    misses: int


class ControlImageCache:
    """Shared by all gateways: each knows all keys and their last uses to within `USE_WRITE_INTERVAL_S`, and above the
    limits evicts the least recently used entry."""

    def __init__(self, store: Records, blobs: BlobStore, clock: Clock, *, limit: int, budget_bytes: int) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._limit = limit
        self._budget_bytes = budget_bytes
        self._entries = LruIndex()
        # Keys by the scope and digest of the image, and of each image that it was made of; and the reverse.
        self._of_blob: dict[tuple[str, str], set[str]] = {}
        self._blobs_of: dict[str, frozenset[tuple[str, str]]] = {}
        self._hits = self._misses = 0

    @property
    def figures(self) -> CacheFigures:
        return CacheFigures(
            entries=len(self._entries),
            size_bytes=self._entries.size_bytes,
            budget_bytes=self._budget_bytes,
            hits=self._hits,
            misses=self._misses,
        )

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if isinstance(change, Deleted):
                self._drop(change.key)
            elif not isinstance(change, CaughtUp):
                image = self._store.read(IMAGES, BUCKET, change)
                # An unreadable entry is evicted first.
                size_bytes, used_s = (image.blob.size_bytes, image.used_s) if image else (0, 0.0)
                self._entries.note(change.key, size_bytes, used_s)
                if image is not None:
                    self._index(change.key, image)

    def _index(self, key: str, image: CachedImage) -> None:
        blobs = frozenset((image.blob.scope, digest) for digest in (image.blob.digest, *image.sources))
        self._blobs_of[key] = blobs
        for blob in blobs:
            self._of_blob.setdefault(blob, set()).add(key)

    def _drop(self, key: str) -> None:
        self._entries.drop(key)
        for blob in self._blobs_of.pop(key, frozenset()):
            self._of_blob[blob].discard(key)
            if not self._of_blob[blob]:
                del self._of_blob[blob]

    async def forget_blob(self, scope: str, digest: str) -> Sequence[BlobInfo]:
        """Drop the entries of that image and of those that were made of it; the latter, which are still stored."""
        made: list[BlobInfo] = []
        for key in sorted(self._of_blob.get((scope, digest), ())):
            record = await self._store.get(BUCKET, key)
            image = self._store.read(IMAGES, BUCKET, record) if record else None
            if image is not None and image.blob.digest != digest:
                made.append(image.blob)
            await self._store.delete(BUCKET, key)
            self._drop(key)
        return made

    async def find(self, request: StageRequest, annotator: AnnouncedAnnotator) -> Output | None:
        """A cache hit: what this annotator made of the same image before, if its blob still exists."""
        if not annotator.deterministic:
            return None
        key = cache_key(request, annotator)
        record = await self._store.get(BUCKET, key)
        image = self._store.read(IMAGES, BUCKET, record) if record else None
        if record is None or image is None or await self._blobs.stat(image.blob.scope, image.blob.digest) is None:
            self._misses += 1
            return None
        self._hits += 1
        await self._note_use(record, image)
        return Output(blob=image.blob, width_px=image.width_px, height_px=image.height_px)

    async def _note_use(self, record: Record, image: CachedImage) -> None:
        """Write the use now and then, for the other gateways; a failed write fails no job."""
        now_s = self._clock.now_s()
        self._entries.note(record.key, image.blob.size_bytes, now_s)
        if now_s - image.used_s > USE_WRITE_INTERVAL_S:
            with contextlib.suppress(FanlightError):
                value = IMAGES.encode(replace(image, used_s=now_s))
                await self._store.put(BUCKET, record.key, value, revision=record.revision)

    async def keep(
        self,
        request: StageRequest,
        annotator: AnnouncedAnnotator,
        made: Output,
        *,
        node: str = "",
        sources: Sequence[str] = (),
    ) -> None:
        """Cache what that node made of images with those digests, and evict what no longer fits."""
        if not annotator.deterministic:
            return
        key, now_s = cache_key(request, annotator), self._clock.now_s()
        image = CachedImage(
            blob=made.blob,
            width_px=made.width_px,
            height_px=made.height_px,
            used_s=now_s,
            node=node,
            sources=tuple(sources),
        )
        await self._write(key, IMAGES.encode(image))
        self._entries.note(key, made.blob.size_bytes, now_s)
        self._index(key, image)
        await self._evict()

    async def purge(self, node: str) -> int:
        """Drop what the node made, and return how many entries that were."""
        dropped, before = 0, ""
        while records := await self._store.list(BUCKET, before=before, limit=PURGE_PAGE):
            for record in records:
                image = self._store.read(IMAGES, BUCKET, record)
                if image is not None and image.node == node:
                    self._drop(record.key)
                    await self._store.delete(BUCKET, record.key)
                    dropped += 1
            before = records[-1].key
        return dropped

    async def _evict(self) -> None:
        entries = self._entries
        while len(entries) > self._limit or (entries.size_bytes > self._budget_bytes and len(entries) > 1):
            last = entries.oldest()
            record = await self._store.get(BUCKET, last.key)
            image = self._store.read(IMAGES, BUCKET, record) if record else None
            if image is not None and image.used_s > last.time_s:
                # Another gateway used it, and the change has not arrived here yet.
                entries.note(last.key, image.blob.size_bytes, image.used_s)
                continue
            self._drop(last.key)
            await self._store.delete(BUCKET, last.key)

    async def _write(self, key: str, value: bytes) -> None:
        """Another gateway that writes the same key at the same time writes the same image."""
        record = await self._store.get(BUCKET, key)
        try:
            if record is None:
                await self._store.create(BUCKET, key, value)
            elif record.value != value:
                await self._store.put(BUCKET, key, value, revision=record.revision)
        except (AlreadyExists, Conflict):
            return
