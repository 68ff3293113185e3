"""The processes of the chaos run, the links between them, and how they are killed, cut and started again.

Gateways speak TLS, and every worker is a node of its own: it joins with a token of the run's issuer.
"""

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos_issuer import Certificates, Issuer
from fanlight.client import AsyncClient
from tests.fakes.nats_server import cluster, free_port

# A machine that is busy with other things takes its time.
START_S = 600.0
READ_BYTES = 64 * 1024
TOKEN = "operator-0123456789"
# So that credentials are renewed many times in a run, and some end while their node is down.
CREDENTIAL_S = 30
# How often a worker that is started again has an empty disk, as a platform's new machine.
WIPED_SHARE = 0.25


class Link:
    """A proxy on loopback that can be cut for a while: open connections break, new ones are refused."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def cut(self, for_s: float) -> None:
        self._is_cut = True
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(for_s)
        self._is_cut = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if not self._is_cut:
                with contextlib.suppress(OSError):
                    await self._join(reader, writer)
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        try:
            ways = [asyncio.ensure_future(_pour(reader, back)), asyncio.ensure_future(_pour(there, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            back.transport.abort()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(READ_BYTES):
        writer.write(data)
        await writer.drain()


@dataclass
class Member:
    """One process of the house."""

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    # What it prints once it may be used; empty where it says nothing.
    ready: str = ""
    # Called before each start.
    prepare: Callable[[], None] = lambda: None
    child: asyncio.subprocess.Process | None = None
    is_up: bool = False
    kills: int = 0

    async def start(self) -> None:
        self.prepare()
        with self.log.open("ab") as log:
            self.child = await asyncio.create_subprocess_exec(
                *self.command,
                stdout=asyncio.subprocess.PIPE if self.ready else log,
                stderr=log,
                env={**os.environ, **self.environment},
            )
        if self.ready:
            assert self.child.stdout is not None
            line = (await self.child.stdout.readline()).decode()
            if not re.match(self.ready, line):
                await self.child.wait()
                raise OSError(f"{self.name} did not start")
        self.is_up = True

    @property
    def lives(self) -> bool:
        """It is up and not about to be started again."""
        return self.is_up and self.child is not None and self.child.returncode is None

    async def kill(self) -> None:
        self.kills += 1
        self.is_up = False
        await self.end(signal.SIGKILL)

    async def end(self, how: signal.Signals) -> None:
        if self.child is not None and self.child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(how)
            await self.child.wait()

    async def start_again(self) -> None:
        """Until it is there; a store without a leader takes a while."""
        async with asyncio.timeout(START_S):
            while True:
                try:
                    await self.start()
                    return
                except OSError:
                    await asyncio.sleep(0.5)


NO_LIARS: Mapping[int, str] = {}


class House:
    """Three NATS servers, two gateways, workers; every gateway's way to each server and every worker's to each gateway
    is a link of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        gateways: int,
        workers: Sequence[int],
        liars: Mapping[int, str] = NO_LIARS,
        checked_share: float | None = None,
    ) -> None:
        """`workers`: their numbers; every third one preprocesses. `liars`: how a worker lies, by its number.

        `checked_share`: of the gateways' settings; None for their default.
        """
        self.folder, self._liars, self._checked_share = folder, liars, checked_share
        self.issuer, self.certificates = Issuer(folder / "issuer"), Certificates(folder / "tls")
        self.servers: list[Member] = []
        self.gateways: list[Member] = []
        self.workers: list[Member] = []
        self.links: list[Link] = []
        self._ports = [free_port() for _ in range(2 * gateways)]
        self._gateways, self._numbers = gateways, workers

    async def start(self) -> None:
        await self.issuer.open()
        self.certificates.open()
        nats = cluster(self.folder / "nats")
        for server in nats:
            server.folder.mkdir(parents=True)
            self.servers.append(Member(f"nats-{server.folder.name}", server.command(), self.folder / "nats.log"))
        for each in self.servers:
            await each.start()
        for i in range(self._gateways):
            await self._add_gateway(i, [server.port for server in nats])
        await asyncio.gather(*(each.start_again() for each in self.gateways))
        for i in self._numbers:
            await self._add_worker(i, "preprocess" if i % 3 == 0 else "diffusion")

    def rotate_keys(self) -> None:
        """The issuer has a new key, and the platform gives each node a token of it."""
        self.issuer.rotate()
        for worker in self.workers:
            self.issuer.write_token(worker.name)

    async def _add_gateway(self, number: int, servers: Sequence[int]) -> None:
        links = await self._linked(servers)
        environment = {
            "FANLIGHT_GATEWAY_DATA_DIR": str(self.folder / f"gateway-{number}"),
            "FANLIGHT_GATEWAY_GRPC": f"127.0.0.1:{self._ports[2 * number]}",
            "FANLIGHT_GATEWAY_HTTP": f"127.0.0.1:{self._ports[2 * number + 1]}",
            "FANLIGHT_GATEWAY_STORE": ",".join(f"nats://127.0.0.1:{port}" for port in links),
            "FANLIGHT_GATEWAY_NATS_REPLICAS": "3",
            "FANLIGHT_GATEWAY_BLOBS": str(self.folder / "blobs"),
            "FANLIGHT_GATEWAY_LEASE_TTL_S": "10",
            "FANLIGHT_GATEWAY_OTHER_ANNOTATORS": "cheap",
            "FANLIGHT_GATEWAY_ISSUERS_FILE": str(self.issuer.rules_file),
            "FANLIGHT_GATEWAY_CREDENTIAL_LIFETIME_S": str(CREDENTIAL_S),
            "FANLIGHT_CLIENT_TOKEN": TOKEN,
        }
        if self._checked_share is not None:
            environment["FANLIGHT_GATEWAY_CHECKED_SHARE"] = str(self._checked_share)
        name = f"gateway-{number}"
        environment |= self.certificates.environment(name)
        command, log = [sys.executable, "-m", "services.gateway"], self.folder / f"{name}.log"
        prepare = lambda: self.certificates.issue(name)  # noqa: E731
        self.gateways.append(Member(name, command, log, environment, ready="ready ", prepare=prepare))

    async def _add_worker(self, number: int, stage: str) -> None:
        links = await self._linked(self._ports[::2])
        name, state = f"worker-{number}", self.folder / f"state-{number}"

        def prepare() -> None:
            if random.random() < WIPED_SHARE:
                shutil.rmtree(state, ignore_errors=True)
            self.issuer.write_token(name)

        environment = {
            "FANLIGHT_WORKER_GATEWAY": ",".join(f"127.0.0.1:{port}" for port in links),
            "FANLIGHT_WORKER_NODE": f"node-{number}",
            "FANLIGHT_WORKER_IDENTITY_TOKEN_FILE": str(self.issuer.token_file(name)),
            "FANLIGHT_WORKER_STATE_DIR": str(state),
            "FANLIGHT_TLS_CA_FILE": str(self.certificates.roots_file),
            "FANLIGHT_CHAOS_STAGE": stage,
            "FANLIGHT_CHAOS_LIAR": self._liars.get(number, ""),
        }
        command = [sys.executable, "-m", "benchmarks.chaos_worker"]
        self.workers.append(Member(name, command, self.folder / f"{name}.log", environment, prepare=prepare))
        await self.workers[-1].start()

    async def _linked(self, targets: Sequence[int]) -> list[int]:
        links = [Link(target) for target in targets]
        for link in links:
            await link.open()
        self.links += links
        return [link.port for link in links]

    def client(self) -> AsyncClient:
        """The operator's, of all gateways."""
        addresses = ",".join(f"127.0.0.1:{port}" for port in self._ports[::2])
        return AsyncClient(addresses, token=TOKEN, ca_file=self.certificates.roots_file)

    @property
    def members(self) -> list[Member]:
        return [*self.servers, *self.gateways, *self.workers]

    async def end(self) -> None:
        for member in self.members:
            await member.end(signal.SIGKILL)
        await self.issuer.close()
