"""What a node's credential and TLS cost: from sending a job to its task in a waiting worker's hands.

usage: python -m benchmarks.gateway_nodes [--rounds 5]. Two gateways take turns in one run: one in clear with this
machine's shared token, and one with a certificate that it made itself, whose worker joined with a code.
"""

import asyncio
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from benchmarks.figures import Report, arguments
from fanlight.channel import bearer_interceptors
from fanlight.client import requests
from fanlight.contract.join_code import OWN_NAME
from fanlight.gateway.v1 import gateway_pb2
from fanlight.nodes.v1 import nodes_pb2, nodes_pb2_grpc
from services.gateway.adapters.certificates import own_certificate
from tests.fakes.gateway_process import GatewayProcess, RpcWorker, jobs_of

OPERATOR, WORKERS = "operator-0123456789", "workers-0123456789"
TURNS = 40


@dataclass(frozen=True)
class Side:
    jobs: Any
    worker: RpcWorker
    times: list[float]


@asynccontextmanager
async def in_clear(folder: Path) -> AsyncIterator[Side]:
    gateway = GatewayProcess(
        folder / "data",
        FANLIGHT_LOG_LEVEL="warning",
        FANLIGHT_CLIENT_TOKEN=OPERATOR,
        FANLIGHT_WORKER_TOKEN=WORKERS,
    )
    await gateway.start()
    try:
        async with gateway.channel(OPERATOR) as client, gateway.channel(WORKERS) as worker:
            yield Side(jobs_of(client), RpcWorker(worker, "diffusion"), [])
    finally:
        await gateway.stop()


@asynccontextmanager
async def over_tls(folder: Path) -> AsyncIterator[Side]:
    files = own_certificate(folder, [], now=datetime.datetime.now(datetime.UTC))
    gateway = GatewayProcess(
        folder / "data",
        FANLIGHT_LOG_LEVEL="warning",
        FANLIGHT_CLIENT_TOKEN=OPERATOR,
        FANLIGHT_TLS_CERT_FILE=str(files.chain),
        FANLIGHT_TLS_KEY_FILE=str(files.key),
    )
    await gateway.start()
    credentials = grpc.ssl_channel_credentials(files.authority.read_bytes())

    def channel(token: str) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            gateway.grpc,
            credentials,
            options=[("grpc.ssl_target_name_override", OWN_NAME)],
            interceptors=bearer_interceptors(token),
        )

    try:
        async with channel(OPERATOR) as client:
            nodes: Any = nodes_pb2_grpc.NodeServiceStub(client)
            code = (await nodes.CreateInvite(nodes_pb2.CreateInviteRequest())).join_code
            joined = await nodes.Join(nodes_pb2.JoinRequest(join_code=code, name="box"))
            async with channel(joined.credential) as worker:
                yield Side(jobs_of(client), RpcWorker(worker, "diffusion", joined.node_id), [])
    finally:
        await gateway.stop()


async def trip(side: Side) -> None:
    polling = asyncio.ensure_future(side.worker.lease(1, wait_s=20.0))
    await asyncio.sleep(0.01)
    begin_s = time.perf_counter()
    creating = asyncio.ensure_future(
        side.jobs.CreateJob(gateway_pb2.CreateJobRequest(generation=requests.generation("a red teapot")))
    )
    (task,) = await polling
    side.times.append(time.perf_counter() - begin_s)
    await creating
    await side.worker.complete(task)


async def measure(rounds: int, report: Report, *, smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / name for name in ("clear", "tls")]
        for root in roots:
            root.mkdir()
        async with in_clear(roots[0]) as clear, over_tls(roots[1]) as tls:
            for side in (clear, tls):
                await side.worker.lease(0)
            for _ in range(2 if smoke else rounds * TURNS):
                for side in (clear, tls):
                    await trip(side)
    medians = [_medians(side.times, 1 if smoke else rounds) for side in (tls, clear)]
    report.ratio("submit to lease, p50, credential and TLS", *medians, against="shared token in clear", goal=1.3)


def _medians(times: list[float], count: int) -> list[float]:
    """Of each part of the run."""
    return [statistics.median(times[len(times) * n // count : len(times) * (n + 1) // count]) for n in range(count)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(argv)
    report = Report()
    asyncio.run(measure(asked.rounds, report, smoke=asked.smoke))
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
