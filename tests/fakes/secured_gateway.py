"""A gateway process with TLS, worker processes that join it, and waiting for what they do."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from fanlight.client import AsyncClient
from fanlight.gateway.v1.gateway_pb2 import WorkerStatus
from tests.fakes.gateway_process import GatewayProcess

Answer = TypeVar("Answer")

PATIENCE_S = 60.0
TOKEN = "operator-0123456789"
# A PNG of one pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)


class Secured(GatewayProcess):
    """Listens everywhere, so that it has TLS; called at loopback."""

    def __init__(self, data: Path, **environment: str) -> None:
        super().__init__(data, FANLIGHT_CLIENT_TOKEN=TOKEN, FANLIGHT_GATEWAY_OTHER_ANNOTATORS="echo", **environment)
        self.grpc = self.http = "0.0.0.0:0"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc.rpartition(':')[2]}"

    @property
    def authority(self) -> Path:
        return self.data / "tls" / "authority.pem"

    def client(self, token: str = TOKEN) -> AsyncClient:
        return AsyncClient(self.address, token=token, ca_file=self.authority)

    async def command(self, *arguments: str, environ: Mapping[str, str] | None = None) -> str:
        own = {"FANLIGHT_GATEWAY": self.address, "FANLIGHT_TOKEN": TOKEN}
        own["FANLIGHT_TLS_CA_FILE"] = str(self.authority)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fanlight.cli.main", *arguments),
            env={**os.environ, **own, **(environ or {})},
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE_S):
            printed, _ = await process.communicate()
        assert process.returncode == 0
        return printed.decode().strip()


@contextlib.asynccontextmanager
async def worker(log: Path, environ: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.worker_process"),
        env={**os.environ, "FANLIGHT_DRAIN_GRACE_S": "1", **environ},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=log.open("ab"),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()


async def until(asked: Callable[[], Awaitable[Answer]], is_so: Callable[[Answer], bool]) -> Answer:
    """The first answer of which that is so."""
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(int(PATIENCE_S / 0.1)):
            if is_so(answer := await asked()):
                return answer
            await asyncio.sleep(0.1)
    raise TimeoutError


async def live_workers(client: AsyncClient) -> list[WorkerStatus]:
    statuses = await until(client.list_workers, lambda found: any(each.live for each in found))
    return [each for each in statuses if each.live]


async def ended(log: Path, environ: Mapping[str, str]) -> int:
    """The exit code of a worker that ends by itself."""
    async with worker(log, environ) as process, asyncio.timeout(PATIENCE_S):
        return await process.wait()
