"""Bytes under their digest: the port of a blob store, media types by the first bytes, and a cache in memory.

Decodes nothing and knows no storage. Each adapter of the port passes the suite in tests/contract.
"""

from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

# Whether a blob, by scope and digest, must be kept.
Keep = Callable[[str, str], bool]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


AVIF, HEIC = "image/avif", "image/heic"
# Of either kind; only the brands behind the first one tell which.
HEIF = "image/heif"
# By the first brand of the box that such a file starts with.
HEIF_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), HEIC),
    **dict.fromkeys((b"mif1", b"msf1"), HEIF),
}


def media_type_of(head: bytes) -> str:
    """The media type of an image by its first 16 bytes; empty for anything else."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "image/gif"
    if head.startswith(b"BM"):
        return "image/bmp"
    if head[:4] in (b"II*\x00", b"MM\x00*"):
        return "image/tiff"
    return HEIF_BRANDS.get(head[8:12], "") if head[4:8] == b"ftyp" else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A single byte range of a blob, as in RFC 9110."""

    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    scope: str
    digest: str
    size_bytes: int
    # Detected from the bytes, such as `image/png`; empty if unknown.
    media_type: str = ""


class BlobStore(Protocol):
    async def write(
        self, scope: str, chunks: AsyncIterable[bytes], *, digest: str = "", size_bytes: int = 0, settled: bool = False
    ) -> BlobInfo:
        """Store the chunks as one blob: visible on return, invisible before; durable if `settled`, else after `settle`.

        The result must have `digest` and `size_bytes` where they are given, else InvalidField. TooLarge above the
        store's limit; ResourceExhausted when its budget is used up.
        """
        ...

    async def stat(self, scope: str, digest: str) -> BlobInfo | None:
        """The blob's facts, or None. Counts as a use, so that a blob that was found stays for a while."""
        ...

    async def settle(self, scope: str, digest: str) -> BlobInfo | None:
        """As `stat`; in addition the blob survives a power cut from now on. For callers that will depend on it."""
        ...

    def read(self, scope: str, digest: str, *, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
        """Chunks from the offset to the end, or to the limit if one is given. NotFound, OutOfRange."""
        ...

    async def delete(self, scope: str, digest: str) -> None:
        """Delete the blob; no error if there is none."""
        ...

    async def sweep(self, *, older_than_s: float, now_s: float, keep: Keep) -> int:
        """Evict blobs that were neither written nor looked up for so long. Returns how many.

        `keep(scope, digest)` may be called from another thread. A true answer counts as a use.
        """
        ...


class ByteLru(Generic[Key, Value]):
    """A cache bounded by bytes, with eviction of the least recently used entry (LRU). For one thread; knows no clock.

    A value larger than the whole cache is not cached. `count_limit`: how many entries at most; 0 for no such limit.
    """

    def __init__(self, *, limit_bytes: int, size_of: Callable[[Value], int], count_limit: int = 0) -> None:
        self._limit_bytes = limit_bytes
        self._count_limit = count_limit
        self._size_of = size_of
        # The least recently used first.
        self._entries: OrderedDict[Key, Value] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def get(self, key: Key, *, touch: bool = True) -> Value | None:
        """None if it is not cached. `touch`: whether this counts as a use."""
        value = self._entries.get(key)
        if value is not None and touch:
            self._entries.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        """Replace the key's old value, and evict others until everything fits."""
        self.drop(key)
        size_bytes = self._size_of(value)
        if size_bytes > self._limit_bytes:
            return
        self._entries[key] = value
        self.size_bytes += size_bytes
        while self.size_bytes > self._limit_bytes or (self._count_limit and len(self._entries) > self._count_limit):
            self.drop(next(iter(self._entries)))

    def drop(self, key: Key) -> None:
        """No error if it is not cached."""
        value = self._entries.pop(key, None)
        if value is not None:
            self.size_bytes -= self._size_of(value)

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0
