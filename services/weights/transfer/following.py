"""What reads a download's bytes while the rest of them still arrives, so that its end costs no second reading."""

import asyncio
from typing import Protocol

from services.weights.references.manifest import ByteSpan
from services.weights.references.tensors import Digested, FileDigests
from services.weights.transfer.pacing import DownloadTools
from services.weights.transfer.partial import PartialFile

STEP_BYTES = 8 * 1024 * 1024


class DownloadFollower(Protocol):
    """Reads a download's bytes while it runs, and checks them at its end."""

    def advance(self) -> None: ...

    async def finish(self) -> Digested | None: ...

    async def stop(self) -> None: ...


class StreamingHasher:
    """Digests the contiguous bytes from the start while the rest still arrives, and starts writing them to disk."""

    def __init__(self, part: PartialFile, tools: DownloadTools, *, is_safetensors: bool) -> None:
        self._part = part
        self._tools = tools
        self._digests = FileDigests(size_bytes=part.map.size, is_safetensors=is_safetensors)
        self._at = 0
        self._task: asyncio.Task[None] | None = None

    def advance(self) -> None:
        is_idle = self._task is None or self._task.done()
        if is_idle and self._part.map.frontier - self._at >= STEP_BYTES:
            self._task = asyncio.create_task(self._feed(self._part.map.frontier))

    async def _feed(self, end: int) -> None:
        span = ByteSpan(self._at, end)
        await self._tools.run(self._part.feed, self._digests.update, span)
        await self._tools.run(self._part.begin_writing, span)
        self._at = end

    async def finish(self) -> Digested:
        if self._task is not None:
            await self._task
        await self._feed(self._part.map.size)
        return self._digests.finish()

    async def stop(self) -> None:
        """Wait until no thread reads the part."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
