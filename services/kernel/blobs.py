"""The port through which bytes are kept under their digest. Each adapter passes the suite in tests/contract."""

from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

Keep = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    scope: str
    digest: str
    size_bytes: int
    # Told from the bytes, such as `image/png`; empty where unknown.
    media_type: str = ""


class BlobStore(Protocol):
    async def write(
        self, scope: str, chunks: AsyncIterable[bytes], *, digest: str = "", size_bytes: int = 0, settled: bool = False
    ) -> BlobInfo:
        """Keep the chunks as one blob: there on return, invisible before; durable if `settled`, else after `settle`.

        `digest` and `size_bytes`, where given, must come out right, else InvalidField; TooLarge above the
        store's limit; ResourceExhausted when its budget is used up.
        """
        ...

    async def stat(self, scope: str, digest: str) -> BlobInfo | None:
        """What is known of it. Asking counts as a use, so that what is found stays for a while."""
        ...

    async def settle(self, scope: str, digest: str) -> BlobInfo | None:
        """As `stat`; and what is there survives a power cut from then on. For whoever is about to count on it."""
        ...

    def read(self, scope: str, digest: str, *, offset_bytes: int = 0, limit_bytes: int = 0) -> AsyncIterator[bytes]:
        """Chunks from the offset to the end, or to the limit where one is given. NotFound, OutOfRange."""
        ...

    async def delete(self, scope: str, digest: str) -> None:
        """Forget it; no error where there is none."""
        ...

    async def sweep(self, *, older_than_s: float, now_s: float, keep: Keep) -> int:
        """Forget what was neither written nor asked about for so long; how many there were.

        `keep(scope, digest)` may be called from another thread. A true answer counts as a use.
        """
        ...
