"""What a tenant's neighbor gets of a gateway: its place in the queue, and the time of its calls.

`fair`: a tenant has 1,000 tasks of any priority and of two checkpoints; another sends one at a time, which must be in
what the next asking worker gets: one task, or a batch.
`busy`: a tenant, another process, sits at every limit: waiting tasks, requests a second, streams, uploads, and webhooks
to a target that never answers; what it is refused it asks again. Its neighbor's calls take turns, alone and beside it.

usage: python -m benchmarks.neighbors fair|busy [--tries 50] [--rounds 3]
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx

from benchmarks.figures import RATIO, Report, arguments
from benchmarks.strangers import over_grpc, over_http, p95_s, turn
from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.client import requests
from fanlight.contract.limits import PRIORITY_LIMIT
from fanlight.gateway.v1 import gateway_pb2
from tests.fakes.gateway_process import GatewayProcess, RpcWorker, jobs_of

OPERATOR, WORKERS, GREEDY, SMALL = (f"{name}-0123456789" for name in ("operator", "workers", "greedy", "small"))
GREEDY_TASKS, IMAGES_A_JOB, BATCH = 1_000, 25, 8
CHECKPOINTS = ("starter", "other")
GOAL = 1.2
REQUESTS_PER_S = 50.0
# What the greedy tenant asks, of what it may.
TOO_MUCH = 2.0
STREAMS, UPLOADS, WEBHOOKS = 100, 16, 50
OPS_A_TURN = 100
SETTLE_S = 3.0
READY = "at every limit\n"


@asynccontextmanager
async def house() -> AsyncIterator[GatewayProcess]:
    """A gateway with both tenants, whose worker was there and said what it can do."""
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "tenants"
        tenants.write_text(f"greedy {GREEDY}\nsmall {SMALL}\n")
        gateway = GatewayProcess(
            Path(folder) / "data",
            FANLIGHT_CLIENT_TOKEN=OPERATOR,
            FANLIGHT_WORKER_TOKEN=WORKERS,
            FANLIGHT_GATEWAY_TENANTS_FILE=str(tenants),
            FANLIGHT_GATEWAY_WAITING_TASKS_LIMIT=str(GREEDY_TASKS),
            FANLIGHT_GATEWAY_TENANT_STREAMS=str(STREAMS),
            FANLIGHT_GATEWAY_TENANT_UPLOADS=str(UPLOADS),
            FANLIGHT_GATEWAY_TENANT_WEBHOOKS=str(WEBHOOKS),
            FANLIGHT_GATEWAY_WEBHOOK_SECRET="whsec_bmVpZ2hib3JzLW5laWdoYm9ycy1uZWlnaGJvcnM=",
            FANLIGHT_GATEWAY_WEBHOOK_NETWORKS="127.0.0.0/8",
            FANLIGHT_LOG_LEVEL="error",
        )
        await gateway.start()
        try:
            async with gateway.channel(WORKERS) as workers:
                await RpcWorker(workers, "diffusion").lease(0)
            yield gateway
        finally:
            await gateway.stop()


async def fair(report: Report, *, tries: int, tasks: int) -> None:
    draw = random.Random(1)
    async with (
        house() as gateway,
        gateway.channel(WORKERS) as workers,
        gateway.channel(GREEDY) as greedy,
        gateway.channel(SMALL) as small,
    ):
        worker = RpcWorker(workers, "diffusion")
        theirs: Any = jobs_of(greedy)
        mine: Any = jobs_of(small)
        for _ in range(tasks // IMAGES_A_JOB):
            priority = draw.randint(-PRIORITY_LIMIT, PRIORITY_LIMIT)
            await theirs.CreateJob(_job(draw.choice(CHECKPOINTS), IMAGES_A_JOB, priority=priority))
        for limit, what in ((1, "the next free slot"), (BATCH, f"the next batch of {BATCH}")):
            found = 0
            for _ in range(tries):
                priority = draw.randint(-PRIORITY_LIMIT, PRIORITY_LIMIT)
                job = await mine.CreateJob(_job(draw.choice(CHECKPOINTS), 1, priority=priority))
                leased = await worker.lease(limit)
                others = [task for task in leased if not task.name.startswith(f"{job.name}/")]
                found += len(others) < len(leased)
                for task in leased:
                    await worker.complete(task)
                # What was left out may not count for the next try.
                await mine.CancelJob(gateway_pb2.CancelJobRequest(name=job.name))
                if others:
                    await theirs.CreateJob(_job(draw.choice(CHECKPOINTS), len(others)))
            report.add(
                f"a task beside {tasks:,} of another tenant is in {what}, of {tries} tries",
                found / tries,
                RATIO,
                goal=1.0,
                at_least=True,
            )


def _job(model: str, count: int, **changes: Any) -> gateway_pb2.CreateJobRequest:
    return gateway_pb2.CreateJobRequest(
        generation=requests.generation("a red teapot", model=model, count=count), **changes
    )


async def busy(report: Report, *, rounds: int, count: int, settle_s: float) -> None:
    async with house() as gateway, gateway.channel(SMALL) as channel:
        headers = {"Authorization": f"Bearer {SMALL}"}
        async with httpx.AsyncClient(base_url=f"http://{gateway.http}", headers=headers, timeout=60) as client:
            doors = {"HTTP": over_http(client), "gRPC": over_grpc(jobs_of(channel))}
            await turn(doors, 3)
            quiet, beside = [], []
            for _ in range(rounds):
                quiet.append(await _paced(doors, count))
                async with _a_greedy_tenant(gateway, settle_s):
                    beside.append(await _paced(doors, count))
    for name, door in quiet[0]:
        ours, theirs = ([p95_s(times[name, door]) for times in each] for each in (beside, quiet))
        report.ratio(f"{name} over {door}, p95", ours, theirs, against="alone", goal=GOAL)
        report.add(f"{name} over {door}, p50", [statistics.median(each[name, door]) * 1e3 for each in beside], "ms")


async def _paced(doors: Any, count: int) -> Any:
    """Within the neighbor's own rate."""
    times: Any = {}
    for _ in range(count):
        for key, found in (await turn(doors, 1)).items():
            times.setdefault(key, []).extend(found)
        await asyncio.sleep(len(times) / REQUESTS_PER_S)
    return times


@asynccontextmanager
async def _a_greedy_tenant(gateway: GatewayProcess, settle_s: float) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.neighbors",
        "busy",
        "--greedy",
        gateway.grpc,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert (await process.stdout.readline()).decode() == READY, "the greedy tenant did not start"
        await asyncio.sleep(settle_s)
        yield
    finally:
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.sleep(settle_s)


async def be_greedy(address: str) -> None:
    """Take every place there is and ask for more, until the standard input ends."""
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    hanging = await asyncio.start_server(_never_answer, "127.0.0.1", 0)
    port = hanging.sockets[0].getsockname()[1]
    async with grpc.aio.insecure_channel(address) as channel:
        metadata = (("authorization", f"Bearer {GREEDY}"),)
        jobs: Any = jobs_of(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            for _ in range(WEBHOOKS):
                request = _job("starter", 1, webhook_url=f"http://127.0.0.1:{port}/")
                job = await jobs.CreateJob(request, metadata=metadata)
                await jobs.CancelJob(gateway_pb2.CancelJobRequest(name=job.name), metadata=metadata)
        with contextlib.suppress(grpc.aio.AioRpcError):
            for _ in range(2 * GREEDY_TASKS // IMAGES_A_JOB):
                waiting = await jobs.CreateJob(_job("starter", IMAGES_A_JOB), metadata=metadata)
                await asyncio.sleep(1 / REQUESTS_PER_S)
        listed = await jobs.ListJobs(gateway_pb2.ListJobsRequest(page_size=1), metadata=metadata)
        waiting = listed.jobs[0]
        watch = gateway_pb2.WatchJobRequest(name=waiting.name)
        open_calls: list[Any] = [jobs.WatchJob(watch, metadata=metadata) for _ in range(2 * STREAMS)]
        blobs: Any = blobs_pb2_grpc.BlobServiceStub(channel)
        open_calls += [blobs.WriteBlob(_half_a_blob(), metadata=metadata) for _ in range(2 * UPLOADS)]
        print(READY, end="", flush=True)
        more = _job("starter", IMAGES_A_JOB, webhook_url=f"http://127.0.0.1:{port}/")
        while not ended.done():
            with contextlib.suppress(grpc.aio.AioRpcError):
                await jobs.CreateJob(more, metadata=metadata)
            await asyncio.wait([ended], timeout=1 / (TOO_MUCH * REQUESTS_PER_S))
        for call in open_calls:
            call.cancel()
    hanging.close()


async def _never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        pass
    writer.close()


async def _half_a_blob() -> AsyncIterator[blobs_pb2.WriteBlobRequest]:
    yield blobs_pb2.WriteBlobRequest(header=blobs_pb2.WriteBlobHeader(size_bytes=1_000_000))
    yield blobs_pb2.WriteBlobRequest(chunk=b"x" * 1_000)
    await asyncio.sleep(3_600)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("fair", "busy"))
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--greedy", default="", metavar="ADDRESS", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.greedy:
        asyncio.run(be_greedy(asked.greedy))
        return 0
    report = Report()
    if asked.what == "fair":
        sizes = {"tries": 3, "tasks": 100} if asked.smoke else {"tries": asked.tries, "tasks": GREEDY_TASKS}
        asyncio.run(fair(report, **sizes))
    else:
        rounds, count = (1, 3) if asked.smoke else (asked.rounds, OPS_A_TURN)
        asyncio.run(busy(report, rounds=rounds, count=count, settle_s=0.1 if asked.smoke else SETTLE_S))
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
