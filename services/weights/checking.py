"""Are the bytes right? Digests that are made along behind a download, and those of single tensors and chunks."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from services.weights.chunks import Span
from services.weights.digesting import Digested, FileDigests
from services.weights.partial import Partial
from services.weights.targets import Digest, Tools

STEP_BYTES = 8 * 1024 * 1024


class Following(Protocol):
    """What goes along behind a download, and says at its end whether the bytes are right."""

    def advance(self) -> None: ...

    async def finish(self) -> Digested | None: ...

    async def stop(self) -> None: ...


class Follower:
    """Digests what is there without a gap from the first byte, and has it written, while the rest is still coming."""

    def __init__(self, part: Partial, tools: Tools, *, is_safetensors: bool) -> None:
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
        span = Span(self._at, end)
        await self._tools.run(self._part.feed, self._digests.update, span)
        await self._tools.run(self._part.begin_writing, span)
        self._at = end

    async def finish(self) -> Digested:
        if self._task is not None:
            await self._task
        await self._feed(self._part.map.size)
        return self._digests.finish()

    async def stop(self) -> None:
        """Let no thread read the part any more."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


def drop_wrong(part: Partial, digests: Sequence[Digest]) -> int:
    """Count the spans whose bytes are not those of their digests as missing again; how many there were."""
    bad = [d.span for d in digests if part.digest(d.span) != d.sha256]
    for span in bad:
        part.drop(span)
    return len(bad)
