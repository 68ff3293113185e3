"""The small blobs that were just written, in memory: most are read once, by somebody who waits for them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.kernel.blobs import BlobInfo

LIMIT, LIMIT_BYTES = 4_096, 16 * 1024 * 1024
# Shorter than the time after which any blob may be forgotten: what is found here is there.
KEPT_S = 60.0

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Recent:
    info: BlobInfo
    pieces: Sequence[bytes]
    until_s: float

    def read(self, offset_bytes: int, limit_bytes: int) -> Iterator[bytes]:
        """From an offset that is not beyond the end."""
        left = min(self.info.size_bytes - offset_bytes, limit_bytes or self.info.size_bytes)
        for piece in self.pieces:
            part = piece[offset_bytes : offset_bytes + left] if offset_bytes or left < len(piece) else piece
            offset_bytes = max(0, offset_bytes - len(piece))
            left -= len(part)
            if part:
                yield part


class RecentBlobs:
    def __init__(self, *, limit_bytes: int = LIMIT_BYTES, now_s: Callable[[], float] = time.monotonic) -> None:
        self._limit_bytes = limit_bytes
        self._now_s = now_s
        # The oldest in front.
        self._kept: dict[Key, Recent] = {}
        self._size_bytes = 0

    def add(self, info: BlobInfo, pieces: Sequence[bytes]) -> None:
        self.drop(info.scope, info.digest)
        self._kept[info.scope, info.digest] = Recent(info, pieces, self._now_s() + KEPT_S)
        self._size_bytes += info.size_bytes
        while self._size_bytes > self._limit_bytes or len(self._kept) > LIMIT:
            self.drop(*next(iter(self._kept)))

    def get(self, scope: str, digest: str) -> Recent | None:
        found = self._kept.get((scope, digest))
        if found is not None and found.until_s < self._now_s():
            self.drop(scope, digest)
            return None
        return found

    def drop(self, scope: str, digest: str) -> None:
        found = self._kept.pop((scope, digest), None)
        if found is not None:
            self._size_bytes -= found.info.size_bytes

    def clear(self) -> None:
        self._kept.clear()
        self._size_bytes = 0
