"""A proxy on loopback between two parties that keeps every byte that passes, as somebody on the way would see it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class RecordingProxy:
    def __init__(self, target: str) -> None:
        """`target`: HOST:PORT."""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.address = ""
        self.connections = 0
        # Per connection and direction, so that what is sent in two parts is found as one.
        self._streams: list[bytearray] = []

    @property
    def size_bytes(self) -> int:
        return sum(len(each) for each in self._streams)

    def has(self, needle: bytes) -> bool:
        return any(needle in each for each in self._streams)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["RecordingProxy"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, back = await asyncio.open_connection(self._host, self._port)
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        seen = bytearray()
        self._streams.append(seen)
        with contextlib.suppress(OSError):
            while data := await source.read(64 * 1024):
                seen += data
                sink.write(data)
                await sink.drain()
        sink.close()
