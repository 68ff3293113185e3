"""Control images made before: by what was asked, of which bytes, and by which annotator on which device."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace

from fanlight.errors import AlreadyExists, Conflict, FanlightError
from services.gateway.app.records import Codec
from services.gateway.app.uses import Uses
from services.gateway.jobs.model import Output, StageRequest
from services.gateway.jobs.workers import Annotator
from services.gateway.ports import CaughtUp, Clock, Deleted, JobStore, Record
from services.kernel.blobs import BlobInfo, BlobStore

BUCKET = "control_images"
TOLD_EVERY_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedImage:
    blob: BlobInfo
    width_px: int
    height_px: int
    # On the wall clock; may lag by `TOLD_EVERY_S`.
    used_s: float = 0.0


IMAGES: Codec[CachedImage] = Codec(CachedImage)


def cache_key(request: StageRequest, annotator: Annotator) -> str:
    """The same for the same message, which names its image by digest, and the same code on the same device."""
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


class ControlImages:
    """Shared by all gateways: each knows the keys of all and when they were last used, to within `TOLD_EVERY_S`, and
    above the limits forgets those whose use is longest ago."""

    def __init__(self, store: JobStore, blobs: BlobStore, clock: Clock, *, limit: int, budget_bytes: int) -> None:
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._limit = limit
        self._budget_bytes = budget_bytes
        self._entries = Uses()
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
                self._entries.drop(change.key)
            elif not isinstance(change, CaughtUp):
                image = IMAGES.read(BUCKET, change)
                # One that cannot be read is the first to go.
                size_bytes, used_s = (image.blob.size_bytes, image.used_s) if image else (0, 0.0)
                self._entries.note(change.key, size_bytes, used_s)

    async def find(self, request: StageRequest, annotator: Annotator) -> Output | None:
        """What this annotator made of the same before, if its bytes are still there."""
        if not annotator.deterministic:
            return None
        key = cache_key(request, annotator)
        record = await self._store.get(BUCKET, key)
        image = IMAGES.read(BUCKET, record) if record else None
        if record is None or image is None or await self._blobs.stat(image.blob.scope, image.blob.digest) is None:
            self._misses += 1
            return None
        self._hits += 1
        await self._note_use(record, image)
        return Output(blob=image.blob, width_px=image.width_px, height_px=image.height_px)

    async def _note_use(self, record: Record, image: CachedImage) -> None:
        """Tell the other gateways now and then; nobody's job fails for that."""
        now_s = self._clock.now_s()
        self._entries.note(record.key, image.blob.size_bytes, now_s)
        if now_s - image.used_s > TOLD_EVERY_S:
            with contextlib.suppress(FanlightError):
                value = IMAGES.encode(replace(image, used_s=now_s))
                await self._store.put(BUCKET, record.key, value, revision=record.revision)

    async def keep(self, request: StageRequest, annotator: Annotator, made: Output) -> None:
        """Remember what was made."""
        if not annotator.deterministic:
            return
        key, now_s = cache_key(request, annotator), self._clock.now_s()
        image = CachedImage(blob=made.blob, width_px=made.width_px, height_px=made.height_px, used_s=now_s)
        await self._write(key, IMAGES.encode(image))
        self._entries.note(key, made.blob.size_bytes, now_s)
        await self._make_room()

    async def _make_room(self) -> None:
        entries = self._entries
        while len(entries) > self._limit or (entries.size_bytes > self._budget_bytes and len(entries) > 1):
            last = entries.oldest()
            record = await self._store.get(BUCKET, last.key)
            image = IMAGES.read(BUCKET, record) if record else None
            if image is not None and image.used_s > last.time_s:
                # Another gateway used it, and its word is still on the way.
                entries.note(last.key, image.blob.size_bytes, image.used_s)
                continue
            entries.drop(last.key)
            await self._store.delete(BUCKET, last.key)

    async def _write(self, key: str, value: bytes) -> None:
        """Whoever wrote the same key at the same time has made the same image."""
        record = await self._store.get(BUCKET, key)
        try:
            if record is None:
                await self._store.create(BUCKET, key, value)
            elif record.value != value:
                await self._store.put(BUCKET, key, value, revision=record.revision)
        except (AlreadyExists, Conflict):
            return
