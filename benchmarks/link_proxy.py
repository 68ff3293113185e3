"""A proxy that forwards GET requests, for benchmarks of links: a node reaches the outside through it only.

Run: `python -m benchmarks.link_proxy --port 3128`. Knows no CONNECT, no bodies of requests and no cache. A connection
of a client has one of its own to the server.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

HEAD_BYTES_MAX = 64 * 1024
BLOCK_BYTES = 64 * 1024


async def serve(client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
    server: asyncio.StreamWriter | None = None
    relaying: asyncio.Task[None] | None = None
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            line, _, headers = (await client.readuntil(b"\r\n\r\n")).partition(b"\r\n")
            method, url, version = line.decode().split()
            parts = urlsplit(url)
            if server is None:
                answers, server = await asyncio.open_connection(parts.hostname, parts.port or 80)
                relaying = asyncio.create_task(relay(answers, back))
            target = f"{parts.path}?{parts.query}" if parts.query else parts.path
            server.write(f"{method} {target} {version}\r\n".encode() + headers)
            await server.drain()
    if server is not None and relaying is not None:
        server.transport.abort()
        await relaying
    back.close()


async def relay(answers: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while block := await answers.read(BLOCK_BYTES):
            back.write(block)
            await back.drain()
    # What the server breaks off is broken off for the client, after what has come.
    back.close()


async def run(address: str, port: int) -> None:
    server = await asyncio.start_server(serve, address, port, limit=HEAD_BYTES_MAX)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=3128)
    asked = parser.parse_args(argv)
    asyncio.run(run(asked.address, asked.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
