"""One file over a home link that breaks: ours against curl with resume and huggingface_hub.

A proxy on loopback stands for the link: one rate for all connections together, a delay, and every connection cut every
few seconds. It drops no packets. Bytes are counted where they enter the link; what is more than the file came twice.
Run: `python -m benchmarks.weights_link [--bytes 150000000] [--mbps 100] [--delay-ms 20] [--cut-s 5]`.
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from tests.fakes.range_server import RangeServer
from tests.fakes.weight_sites import put_repository

BLOCK_BYTES = 16 * 1024
RECEIVE_BUFFER_BYTES = 64 * 1024
TRIES = 200
# What a late timer may make up for.
BURST_S = 0.05
REPO, FILE = "org/m", "model.bin"


class Link:
    """The proxy, in a thread with a loop of its own. `passed_bytes` went down it."""

    def __init__(self, port: int, *, mbps: float, delay_s: float, cut_s: float) -> None:
        self._upstream_port = port
        self._block_s = BLOCK_BYTES * 8 / (mbps * 1e6)
        self._delay_s = delay_s
        self._cut_s = cut_s
        self._free_at_s = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.passed_bytes = 0
        # When the first byte went down, so that nobody is charged for the start of a process.
        self.first_s = 0.0
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        cutting = self._loop.create_task(self._cut())
        self._ready.set()
        self._loop.run_forever()
        server.close()
        cutting.cancel()

    async def _stop(self) -> None:
        """Cut whoever is still there and let the ends be seen."""
        self._cut_s = 0.0
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0.2)

    async def _cut(self) -> None:
        while self._cut_s:
            await asyncio.sleep(self._cut_s)
            for writer in list(self._open):
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(OSError):
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=BLOCK_BYTES)
            up = asyncio.create_task(self._up(reader, up_writer))
            try:
                await self._down(up_reader, writer)
            finally:
                up.cancel()
                up_writer.transport.abort()
        self._open.discard(writer)
        writer.transport.abort()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(BLOCK_BYTES):
                await asyncio.sleep(self._delay_s)
                writer.write(data)
                await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(BLOCK_BYTES):
            now_s = self._loop.time()
            self._free_at_s = max(self._free_at_s, now_s - BURST_S) + self._block_s * len(data) / BLOCK_BYTES
            if self._free_at_s > now_s:
                await asyncio.sleep(self._free_at_s - now_s)
            self.first_s = self.first_s or time.perf_counter()
            self.passed_bytes += len(data)
            writer.write(data)
            await writer.drain()


def _ours(url: str, sha256: str, folder: Path) -> Path:
    env = {**os.environ, "FANLIGHT_WEIGHTS_RETRIES": "100"}
    command = [sys.executable, "-m", "services.weights", "fetch", url, "--sha256", sha256, "--dir", str(folder)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return Path(done.stdout.splitlines()[-1])


def _curl(url: str, sha256: str, folder: Path) -> Path:
    path = folder / "m"
    for _ in range(TRIES):
        if not subprocess.run(["curl", "-sfL", "-C", "-", "-o", str(path), url], check=False).returncode:
            return path
    raise RuntimeError("curl did not come to an end")


def _hub(url: str, sha256: str, folder: Path) -> Path:
    parts = urlsplit(url)
    code = f"from huggingface_hub import hf_hub_download as d; print(d({REPO!r}, {FILE!r}, cache_dir={str(folder)!r}))"
    env = {**os.environ, "HF_ENDPOINT": f"{parts.scheme}://{parts.netloc}", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for _ in range(TRIES):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        if not done.returncode:
            return Path(done.stdout.splitlines()[-1])
    raise RuntimeError("huggingface_hub did not come to an end")


def _measure(
    name: str, fetch: Callable[[str, str, Path], Path], server: RangeServer, body: bytes, arguments: argparse.Namespace
) -> None:
    port = urlsplit(server.url).port or 0
    delay_s = arguments.delay_ms / 1000
    with Link(port, mbps=arguments.mbps, delay_s=delay_s, cut_s=arguments.cut_s) as link:
        sha256 = hashlib.sha256(body).hexdigest()
        for file in server.files.values():
            file.redirect = f"http://localhost:{link.port}/cdn/{sha256}?signature=x" if file.redirect else ""
        with tempfile.TemporaryDirectory() as folder:
            path = fetch(f"http://127.0.0.1:{link.port}/{REPO}/resolve/main/{FILE}", sha256, Path(folder))
            took_s = time.perf_counter() - link.first_s
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    share = len(body) * 8 / took_s / (arguments.mbps * 1e6)
    wasted = max(0, link.passed_bytes - len(body))
    print(f"| {name} | {took_s:.1f} | {share:.3f} | {wasted:,} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=150_000_000)
    parser.add_argument("--mbps", type=float, default=100)
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--cut-s", type=float, default=5)
    arguments = parser.parse_args()
    body = random.Random(1).randbytes(arguments.bytes)
    print("| who | seconds from the first byte | share of the link's rate | bytes beyond the file |")
    print("|---|---|---|---|")
    with RangeServer() as server:
        put_repository(server, REPO, {FILE: body})
        _measure("Fanlight", _ours, server, body, arguments)
        if shutil.which("curl"):
            _measure("curl -C - until it is whole", _curl, server, body, arguments)
        _measure("huggingface_hub until it is whole", _hub, server, body, arguments)


if __name__ == "__main__":
    main()
