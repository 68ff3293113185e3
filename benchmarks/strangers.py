"""What a tenant waits for submit, read and list while a stranger without a token holds connections and calls open.

The stranger is another process, at another address of loopback: half a request's head on each connection of HTTP, and
gRPC calls that never send their message, half of them to health. What the gateway ends is opened again, AGAIN_PER_S of
each a second.
A tenant over HTTP and one over gRPC take turns, alone and beside the stranger.

usage: python -m benchmarks.strangers [--connections 4000] [--calls 2000] [--rounds 7]
"""

import argparse
import asyncio
import contextlib
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx

from benchmarks.figures import Report, arguments
from fanlight.channel import open_channel
from fanlight.client import requests
from fanlight.gateway.v1 import gateway_pb2
from tests.fakes.gateway_process import GatewayProcess, RpcWorker, jobs_of

GOAL = 1.5
ADDRESS = "127.0.0.2"
TENANT, OPERATOR, WORKERS = "tenant-0123456789", "operator-0123456789", "workers-0123456789"
HALF_HEAD = b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX-A: "
PATHS = ("/fanlight.gateway.v1.JobService/ListJobs", "/grpc.health.v1.Health/Check")
CALLS_A_CHANNEL = 100
# Connections, and calls.
AGAIN_PER_S = 50
LOOK_S = 0.02
# For the stranger to have opened all, and for the gateway to be at rest again.
SETTLE_S = 4.0
OPS_A_TURN = 100
OPEN = "open\n"

Ask = Callable[[], Awaitable[Any]]


class Stranger:
    """Opens again what is closed, until its standard input ends."""

    def __init__(self, http: str, rpc: str, connections: int, calls: int) -> None:
        host, _, port = http.rpartition(":")
        self._http = host, int(port)
        self._rpc = rpc
        self._connections: list[socket.socket | None] = [None] * connections
        self._calls: list[Any] = [None] * calls
        self._channels: list[grpc.aio.Channel] = []

    async def run(self) -> None:
        count = -(-len(self._calls) // CALLS_A_CHANNEL)
        # A connection of its own for each.
        self._channels = [
            grpc.aio.insecure_channel(self._rpc, options=[("grpc.use_local_subchannel_pool", 1), ("stranger", number)])
            for number in range(count)
        ]
        ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
        self._open(len(self._connections) + len(self._calls))
        print(OPEN, end="", flush=True)
        while not ended.done():
            self._open(int(AGAIN_PER_S * LOOK_S))
            await asyncio.wait([ended], timeout=LOOK_S)

    def _open(self, limit: int) -> None:
        """So many of those that are not open."""
        closed = (at for at, held in enumerate(self._connections) if held is None or _is_closed(held))
        for at in islice(closed, limit):
            self._connections[at] = self._connection()
        ended = (at for at, call in enumerate(self._calls) if call is None or call.done())
        for at in islice(ended, limit):
            self._calls[at] = self._channels[at // CALLS_A_CHANNEL].stream_unary(PATHS[at % 2])()

    def _connection(self) -> socket.socket | None:
        connection = socket.socket()
        try:
            connection.settimeout(5)
            connection.bind((ADDRESS, 0))
            connection.connect(self._http)
            connection.sendall(HALF_HEAD)
            connection.setblocking(False)
        except OSError:
            connection.close()
            return None
        return connection


def _is_closed(connection: socket.socket) -> bool:
    try:
        found = connection.recv(4096)
    except BlockingIOError:
        return False
    except OSError:
        found = b""
    if not found:
        connection.close()
    return not found


@asynccontextmanager
async def a_stranger(gateway: GatewayProcess, connections: int, calls: int, settle_s: float) -> AsyncIterator[None]:
    words = ["--stranger", gateway.http, gateway.grpc, "--connections", str(connections), "--calls", str(calls)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.strangers",
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        opened = (await process.stdout.readline()).decode()
        assert opened == OPEN, "the stranger did not start"
        await asyncio.sleep(settle_s)
        yield
    finally:
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.sleep(settle_s)


def over_http(client: httpx.AsyncClient) -> dict[str, Ask]:
    job = {"generation": {"prompt": "a red teapot"}}
    names: list[str] = []

    async def submit() -> None:
        answer = await client.post("/v1/jobs", json=job)
        answer.raise_for_status()
        names.append(answer.json()["name"])

    async def read() -> None:
        (await client.get(f"/v1/{names[-1]}")).raise_for_status()

    async def list_() -> None:
        (await client.get("/v1/jobs", params={"page_size": 10})).raise_for_status()

    return {"submit": submit, "read": read, "list": list_}


def over_grpc(jobs: Any) -> dict[str, Ask]:
    new = gateway_pb2.CreateJobRequest(generation=requests.generation("a red teapot"))
    names: list[str] = []

    async def submit() -> None:
        names.append((await jobs.CreateJob(new)).name)

    async def read() -> None:
        await jobs.GetJob(gateway_pb2.GetJobRequest(name=names[-1]))

    async def list_() -> None:
        await jobs.ListJobs(gateway_pb2.ListJobsRequest(page_size=10))

    return {"submit": submit, "read": read, "list": list_}


Times = dict[tuple[str, str], list[float]]


async def turn(doors: dict[str, dict[str, Ask]], count: int) -> Times:
    """Seconds of each operation through each door, one at a time."""
    times: Times = {(name, door): [] for door, asks in doors.items() for name in asks}
    for _ in range(count):
        for door, asks in doors.items():
            for name, ask in asks.items():
                begin_s = time.perf_counter()
                await ask()
                times[name, door].append(time.perf_counter() - begin_s)
    return times


def p95_s(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


async def measure(report: Report, *, connections: int, calls: int, rounds: int, count: int, settle_s: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "tenants"
        tenants.write_text(f"acme {TENANT}\n")
        gateway = GatewayProcess(
            Path(folder) / "data",
            FANLIGHT_CLIENT_TOKEN=OPERATOR,
            FANLIGHT_WORKER_TOKEN=WORKERS,
            FANLIGHT_GATEWAY_TENANTS_FILE=str(tenants),
            FANLIGHT_LOG_LEVEL="error",
        )
        await gateway.start()
        try:
            async with open_channel(gateway.grpc, token=WORKERS) as workers:
                await RpcWorker(workers, "diffusion").lease(0)
            headers = {"Authorization": f"Bearer {TENANT}"}
            async with (
                httpx.AsyncClient(base_url=f"http://{gateway.http}", headers=headers, timeout=60) as client,
                gateway.channel(TENANT) as channel,
            ):
                doors = {"HTTP": over_http(client), "gRPC": over_grpc(jobs_of(channel))}
                await turn(doors, count)
                quiet, beside = [], []
                for _ in range(rounds):
                    quiet.append(await turn(doors, count))
                    async with a_stranger(gateway, connections, calls, settle_s):
                        beside.append(await turn(doors, count))
        finally:
            await gateway.stop()
    for name, door in quiet[0]:
        ours, theirs = ([p95_s(times[name, door]) for times in each] for each in (beside, quiet))
        report.ratio(f"{name} over {door}, p95", ours, theirs, against="alone", goal=GOAL)
        report.add(f"{name} over {door}, p95", [each * 1e3 for each in ours], "ms")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--connections", type=int, default=4_000)
    parser.add_argument("--calls", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stranger", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    connections, calls = (40, 20) if asked.smoke else (asked.connections, asked.calls)
    if asked.stranger:
        http, rpc = asked.stranger
        asyncio.run(Stranger(http, rpc, asked.connections, asked.calls).run())
        return 0
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    report = Report()
    rounds, count, settle_s = (2, 2, 0.5) if asked.smoke else (asked.rounds, OPS_A_TURN, SETTLE_S)
    asyncio.run(measure(report, connections=connections, calls=calls, rounds=rounds, count=count, settle_s=settle_s))
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
