"""A packed download made into the file's own bytes, frame by frame, while the rest still comes."""

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path

from services.weights.chunks import Span
from services.weights.digesting import Digested, FileDigests
from services.weights.errors import WrongBytes
from services.weights.files import begin_writing
from services.weights.manifest import Frame
from services.weights.packing import unpack
from services.weights.partial import Partial
from services.weights.targets import Tools


class Unpacking:
    """Follows a download of these frames, one behind the other; writes what is in them, likewise, to `out`.

    `is_safetensors` is None where the frames are not all of the file: then nothing is digested as a whole.
    """

    def __init__(
        self, part: Partial, tools: Tools, frames: Sequence[Frame], out: Path, *, is_safetensors: bool | None
    ) -> None:
        self._part = part
        self._tools = tools
        self._frames = frames
        size = sum(len(frame.span) for frame in frames)
        self._digests = None if is_safetensors is None else FileDigests(size_bytes=size, is_safetensors=is_safetensors)
        self._file = out.open("wb", buffering=0)
        self._next = 0
        # Where the next frame begins in the download, and its bytes in the file.
        self._at = 0
        self._written = 0
        self._bad: list[Span] = []
        self._task: asyncio.Task[None] | None = None

    def advance(self) -> None:
        is_idle = self._task is None or self._task.done()
        if is_idle and not self._bad and self._is_there(self._part.map.frontier):
            self._task = asyncio.create_task(self._go_on(self._part.map.frontier))

    def _is_there(self, frontier: int) -> bool:
        return self._next < len(self._frames) and self._at + len(self._frames[self._next].packed) <= frontier

    async def _go_on(self, frontier: int) -> None:
        while self._is_there(frontier):
            await self._tools.run(self._one)

    def _one(self) -> None:
        """Unpack the next frame; after a wrong one the others are only looked at."""
        frame = self._frames[self._next]
        place = Span(self._at, self._at + len(frame.packed))
        data = self._part.read(place.begin, len(place))
        if hashlib.sha256(data).hexdigest() != frame.sha256:
            self._bad.append(place)
        elif not self._bad:
            self._write(unpack(data, len(frame.span)))
        self._next, self._at = self._next + 1, place.end

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        begin_writing(self._file.fileno(), self._written, len(data))
        self._written += len(data)
        if self._digests:
            self._digests.update(data)

    async def finish(self) -> Digested | None:
        """WrongBytes when frames were wrong; they count as missing again."""
        if self._task is not None:
            await self._task
        await self._go_on(self._part.map.size)
        for place in self._bad:
            self._part.drop(place)
        if self._bad:
            raise WrongBytes(f"{len(self._bad)} of {len(self._frames)} packed frames came wrong")
        return self._digests.finish() if self._digests else None

    async def stop(self) -> None:
        """Let no thread read the download any more."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._file.close()
