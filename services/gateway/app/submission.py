"""From a checked request to a plan: its images become blobs, cached control images are looked up.

Knows no stage's message: `wire` checks requests and makes drafts of them.
"""

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fanlight.contract.names import DEFAULT_SCOPE
from fanlight.errors import InvalidField, NotFound, TooLarge
from services.gateway.app.control_cache import ControlImageCache
from services.gateway.app.leases import RandomBytes
from services.gateway.app.tenants import Caller
from services.gateway.app.worker_registry import WorkerRegistry
from services.gateway.domain.job import Output, StageRequest
from services.gateway.domain.moderation import Policy
from services.gateway.domain.plan import JobPlan
from services.kernel.blobs import BlobInfo, BlobStore, ByteRange, media_type_of
from services.kernel.image_headers import ImageSize, read_size, size_in

# How much of a stored image is read at a time to find its size.
HEADER_READ_BYTES = 64 * 1024
# A seed that was drawn is short, so that people can copy it.
RANDOM_SEED_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """An image of a request: bytes that came with it, or the digest of an existing blob."""

    # The request's field, such as `generation.controls[0].image`.
    field: str
    data: bytes = dataclasses.field(default=b"", repr=False)
    scope: str = DEFAULT_SCOPE
    # Empty where there are bytes.
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptImage:
    """A request's image as a blob, and its upright size by its header."""

    blob: BlobInfo
    size: ImageSize


class Draft(Protocol):
    """A checked request of a stage; only `wire` knows its message."""

    @property
    def images(self) -> Sequence[SourceImage]: ...

    @property
    def tasks_limit(self) -> int:
        """The largest number of tasks that it can become."""
        ...

    def under(self, policy: Policy) -> "Draft":
        """With what a policy asks for at least, where workers can check images. FailedPrecondition if none can."""
        ...

    def plan(self, kept: Mapping[str, KeptImage], draw: Callable[[], int]) -> JobPlan:
        """The tasks to do, with each image in the place of its field; `draw` returns a random 32-bit number.

        InvalidField and FailedPrecondition name the request's field, for what only the images' sizes show.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job that a client requests, checked by `wire`; its images are not stored yet."""

    draft: Draft
    # Distinguishes requests with the same `request_id`.
    content_digest: str
    request_id: str = ""
    priority: int = 0
    # How long it may take; 0 for no limit.
    deadline_s: float = 0.0
    webhook_url: str = ""
    # Empty: any, or the tenant's own.
    pool: str = ""


class SourceImages:
    """Stores the images of requests: bytes become blobs, digests are looked up."""

    def __init__(self, blobs: BlobStore, *, limit_bytes: int) -> None:
        self._blobs = blobs
        self._limit_bytes = limit_bytes

    async def keep(self, image: SourceImage, caller: Caller) -> KeptImage:
        """InvalidField, NotFound and TooLarge name the request's field."""
        scope = caller.scope_of(image.scope, field=f"{image.field}.blob.scope")
        if image.digest:
            return await self._find(image, scope)
        self._check(image, len(image.data), media_type_of(image.data[:16]))
        size = _sized(image, size_in(image.data))
        return KeptImage(blob=await self._blobs.write(scope, _once(image.data), settled=True), size=size)

    async def _find(self, image: SourceImage, scope: str) -> KeptImage:
        blob = await self._blobs.settle(scope, image.digest)
        if blob is None:
            raise NotFound("there is no such blob; write it first", field=f"{image.field}.blob.digest")
        self._check(image, blob.size_bytes, blob.media_type)
        return KeptImage(blob=blob, size=_sized(image, await self._size_of(blob)))

    async def _size_of(self, blob: BlobInfo) -> ImageSize | None:
        reader = read_size()
        window, start = b"", 0
        try:
            wanted = next(reader)
            while True:
                if not start <= wanted.offset_bytes <= start + len(window) - wanted.size_bytes:
                    window, start = await self._read(blob, wanted), wanted.offset_bytes
                at = wanted.offset_bytes - start
                wanted = reader.send(window[at : at + wanted.size_bytes])
        except StopIteration as done:
            size: ImageSize | None = done.value
            return size

    async def _read(self, blob: BlobInfo, wanted: ByteRange) -> bytes:
        """Those bytes and some that follow, as far as the blob has them."""
        if wanted.offset_bytes >= blob.size_bytes:
            return b""
        limit_bytes = max(wanted.size_bytes, HEADER_READ_BYTES)
        chunks = self._blobs.read(blob.scope, blob.digest, offset_bytes=wanted.offset_bytes, limit_bytes=limit_bytes)
        return b"".join([chunk async for chunk in chunks])

    def _check(self, image: SourceImage, size_bytes: int, media_type: str) -> None:
        if size_bytes > self._limit_bytes:
            raise TooLarge(
                f"has {size_bytes} bytes; an image may have {self._limit_bytes}",
                field=image.field,
            )
        if not media_type.startswith("image/"):
            raise InvalidField("is not a PNG, JPEG, WebP, BMP, GIF, TIFF, AVIF or HEIC", field=image.field)


def _sized(image: SourceImage, size: ImageSize | None) -> ImageSize:
    if size is None:
        raise InvalidField("is a damaged or truncated image: its header cannot be read", field=image.field)
    return size


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


class JobPlanner:
    def __init__(
        self, images: SourceImages, cache: ControlImageCache, workers: WorkerRegistry, random_bytes: RandomBytes
    ) -> None:
        self._images = images
        self._cache = cache
        self._workers = workers
        self._random_bytes = random_bytes

    async def plan(self, draft: Draft, caller: Caller) -> JobPlan:
        """Stores the draft's images. Raises what `SourceImages.keep` raises."""
        kept = {image.field: await self._images.keep(image, caller) for image in draft.images}
        return draft.plan(kept, lambda: int.from_bytes(self._random_bytes(RANDOM_SEED_BYTES)))

    async def made_before(self, plan: JobPlan) -> dict[int, Output]:
        """Cached outputs, by the numbers of the plan's tasks that need not run."""
        found = {}
        for number, task in enumerate(plan.tasks, 1):
            if not task.inputs and (output := await self._find(plan.requests[task.request])):
                found[number] = output
        return found

    async def _find(self, request: StageRequest) -> Output | None:
        if not request.facts.annotator:
            return None
        for annotator in self._workers.offers.variants(request.facts.annotator):
            if output := await self._cache.find(request, annotator):
                return output
        return None
