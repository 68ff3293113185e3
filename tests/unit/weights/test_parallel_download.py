import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from services.weights.errors import ServerBusy, Transient
from services.weights.transfer.answers import RemoteFile
from services.weights.transfer.pacing import Meter
from services.weights.transfer.parallel import ParallelDownload
from services.weights.transfer.partial import ChunkMap, whole_file_layout

CONNECTIONS = 8
SIZE = 64 * 1024 * 1024


class _Writer:
    """Writes nothing; counts a piece as come and a pause as waited."""

    def __init__(self):
        self.pauses = []

    async def write(self, part, span, blocks):
        part.map.add(span.begin, span.end)

    async def back_off(self, failures, error):
        self.pauses.append(failures)


class _Web:
    """All connections open at once fail together with the error; those after them are sound."""

    def __init__(self, error):
        self._error = error
        self._together = asyncio.Barrier(CONNECTIONS)
        self._broken = CONNECTIONS
        self.asked = 0

    @contextlib.asynccontextmanager
    async def piece(self, url, span, known):
        self.asked += 1
        if self._broken:
            self._broken -= 1
            await self._together.wait()
            raise self._error
        yield None


def _filling(writer, web, part):
    return ParallelDownload(
        writer=writer,
        part=part,
        layout=whole_file_layout(SIZE),
        web=web,
        url="http://a/b",
        remote=RemoteFile(url="http://a/b", size_bytes=SIZE),
        meter=Meter(),
        max_connections=CONNECTIONS,
        max_piece_bytes=SIZE,
        slow_bps=0,
        now_s=lambda: 0.0,
        _allowed=CONNECTIONS,
    )


@pytest.mark.parametrize("error", [Transient("cut"), ServerBusy("busy")])
async def test_a_trouble_that_hits_all_connections_at_once_counts_once(error):
    writer, web = _Writer(), _Web(error)
    part = SimpleNamespace(map=ChunkMap(SIZE))
    filling = _filling(writer, web, part)
    await filling.run()
    assert part.map.is_complete
    assert writer.pauses == [1]


class _CutWriter(_Writer):
    """The first connections bring half of their pieces and are then cut, all at once."""

    def __init__(self):
        super().__init__()
        self._together = asyncio.Barrier(CONNECTIONS)
        self._whole = CONNECTIONS

    async def write(self, part, span, blocks):
        if not self._whole:
            part.map.add(span.begin, span.end)
            return
        self._whole -= 1
        part.map.add(span.begin, span.begin + len(span) // 2)
        await self._together.wait()
        raise Transient("cut")


class _SoundWeb:
    @contextlib.asynccontextmanager
    async def piece(self, url, span, known):
        yield None


async def test_connections_that_are_cut_while_bytes_come_are_opened_again_without_a_pause():
    writer = _CutWriter()
    part = SimpleNamespace(map=ChunkMap(SIZE))
    filling = _filling(writer, _SoundWeb(), part)
    await filling.run()
    assert part.map.is_complete
    assert writer.pauses == []
    assert filling._allowed == CONNECTIONS
