"""Control images made before: by what was asked, of which bytes, and by which annotator on which device."""

import hashlib
import json
from dataclasses import dataclass

from services.gateway.app.records import Codec
from services.gateway.jobs.model import Annotation, ControlImage, Output
from services.gateway.jobs.workers import Annotator
from services.gateway.ports import CaughtUp, Deleted, JobStore
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.errors import AlreadyExists, Conflict

BUCKET = "control_images"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedImage:
    blob: BlobInfo
    width_px: int
    height_px: int


IMAGES: Codec[CachedImage] = Codec(CachedImage)


def cache_key(annotation: Annotation, annotator: Annotator) -> str:
    parts = [
        annotation.picture.scope,
        annotation.picture.digest,
        annotation.annotator,
        annotation.parameters,
        annotation.width_px,
        annotation.height_px,
        annotator.version,
        annotator.device,
    ]
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
    """Shared by all gateways: each knows the keys of all, and forgets what it has not used longest above the limits."""

    def __init__(self, store: JobStore, blobs: BlobStore, *, limit: int, budget_bytes: int) -> None:
        self._store = store
        self._blobs = blobs
        self._limit = limit
        self._budget_bytes = budget_bytes
        # The keys there are and the bytes of their images, the least recently used that this process knows in front.
        self._sizes: dict[str, int] = {}
        self._size_bytes = 0
        self._hits = self._misses = 0

    @property
    def figures(self) -> CacheFigures:
        return CacheFigures(
            entries=len(self._sizes),
            size_bytes=self._size_bytes,
            budget_bytes=self._budget_bytes,
            hits=self._hits,
            misses=self._misses,
        )

    async def follow(self) -> None:
        async for change in self._store.watch(BUCKET):
            if isinstance(change, Deleted):
                self._drop(change.key)
            elif not isinstance(change, CaughtUp):
                self._note(change.key, IMAGES.decode(change.value).blob.size_bytes)

    def _note(self, key: str, size_bytes: int) -> None:
        """It is there, and was used just now."""
        self._drop(key)
        self._sizes[key] = size_bytes
        self._size_bytes += size_bytes

    def _drop(self, key: str) -> None:
        self._size_bytes -= self._sizes.pop(key, 0)

    async def find(self, annotation: Annotation, annotator: Annotator) -> ControlImage | None:
        """What this annotator made of the same before, if its bytes are still there."""
        if not annotator.deterministic:
            return None
        key = cache_key(annotation, annotator)
        record = await self._store.get(BUCKET, key)
        image = IMAGES.decode(record.value) if record else None
        if image is None or await self._blobs.stat(image.blob.scope, image.blob.digest) is None:
            self._misses += 1
            return None
        self._hits += 1
        self._note(key, image.blob.size_bytes)
        return ControlImage(
            blob=image.blob,
            annotator=annotation.annotator,
            cached=True,
            width_px=image.width_px,
            height_px=image.height_px,
        )

    async def keep(self, annotation: Annotation, annotator: Annotator, made: Output) -> None:
        """Remember what was made."""
        if not annotator.deterministic:
            return
        key = cache_key(annotation, annotator)
        value = IMAGES.encode(CachedImage(blob=made.blob, width_px=made.width_px, height_px=made.height_px))
        await self._write(key, value)
        self._note(key, made.blob.size_bytes)
        while len(self._sizes) > self._limit or (self._size_bytes > self._budget_bytes and len(self._sizes) > 1):
            oldest = next(iter(self._sizes))
            self._drop(oldest)
            await self._store.delete(BUCKET, oldest)

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
