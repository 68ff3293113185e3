"""Control images made before: by what was asked, of which bytes, and by which annotator on which device."""

import hashlib
import json
from dataclasses import dataclass

from services.gateway.app.records import Codec
from services.gateway.jobs.model import Annotation, ControlImage, Output
from services.gateway.jobs.workers import Annotator
from services.gateway.ports import JobStore
from services.kernel.blobs import BlobInfo, BlobStore
from services.kernel.errors import AlreadyExists, Conflict

BUCKET = "control_images"
PAGE = 1_000


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


class ControlImages:
    def __init__(self, store: JobStore, blobs: BlobStore, *, limit: int) -> None:
        self._store = store
        self._blobs = blobs
        self._limit = limit
        # The keys there are, the oldest that this process knows in front.
        self._keys: dict[str, None] = {}

    async def load(self) -> None:
        page = await self._store.list(BUCKET, limit=PAGE)
        while page:
            self._keys.update((record.key, None) for record in page)
            page = await self._store.list(BUCKET, before=page[-1].key, limit=PAGE)

    async def find(self, annotation: Annotation, annotator: Annotator) -> ControlImage | None:
        """What this annotator made of the same before, if its bytes are still there."""
        if not annotator.deterministic:
            return None
        record = await self._store.get(BUCKET, cache_key(annotation, annotator))
        if record is None:
            return None
        image = IMAGES.decode(record.value)
        if await self._blobs.stat(image.blob.scope, image.blob.digest) is None:
            return None
        return ControlImage(
            blob=image.blob,
            annotator=annotation.annotator,
            cached=True,
            width_px=image.width_px,
            height_px=image.height_px,
        )

    async def keep(self, annotation: Annotation, annotator: Annotator, made: Output) -> None:
        """Remember what was made; the oldest is forgotten above the limit."""
        if not annotator.deterministic:
            return
        key = cache_key(annotation, annotator)
        value = IMAGES.encode(CachedImage(blob=made.blob, width_px=made.width_px, height_px=made.height_px))
        await self._write(key, value)
        self._keys.pop(key, None)
        self._keys[key] = None
        while len(self._keys) > self._limit:
            oldest = next(iter(self._keys))
            del self._keys[oldest]
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
