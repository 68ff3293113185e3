"""What the gateway costs: over SQLite's own commits, over a bare grpc.aio server, and in memory.

usage: python -m benchmarks.gateway sqlite|lease|image|memory [--rounds N]. Ours and the other take turns in one run.
"""

import argparse
import asyncio
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import psutil

from benchmarks.gateway_bare import CHUNK_BYTES, SERVICE
from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.ledger import Ledger
from services.gateway.app.records import JOBS
from services.gateway.jobs import machine, plan
from services.gateway.jobs.model import Job, Lease
from services.kernel.digests import digest_of
from tests.fakes.gateway_process import GatewayProcess, RpcWorker, jobs_of
from tests.fakes.jobs import generation

PNG = b"\x89PNG\r\n\x1a\n"
IMAGE_BYTES = 467_000
CONTROL_BYTES = 425_000
QUEUED = 1_000
AT_A_TIME = 16


def a_job(number: int) -> Job:
    work = generation(prompt="a red teapot on a wooden table, morning light " * 4)
    return plan.create(job_id=f"{number:06}", request_id="", priority=0, work=work, wanted=[], seeds=[1], now_s=1.0)


async def sqlite(rounds: int) -> None:
    """Transitions of jobs, one and sixteen at a time, and commits of records of the same size."""
    with tempfile.TemporaryDirectory() as folder:
        async with open_sqlite_store(Path(folder) / "ours.sqlite") as store:
            ledger = Ledger(store)
            jobs = [await ledger.create(a_job(number)) for number in range(AT_A_TIME)]
            value = JOBS.encode(leased(jobs[0], "t" * 40))
            raw = Raw(Path(folder) / "raw.sqlite", len(value))
            figures: dict[str, list[float]] = {"raw": [], "one": [], "many": []}
            # Short turns and many: a disk's own mood changes within seconds.
            for _ in range(10 * rounds):
                figures["raw"].append(raw.rate(20))
                figures["one"].append(await rate(20, lambda n: turn(ledger, jobs[0].id, n), at_a_time=1))
                figures["many"].append(
                    await rate(80, lambda n: turn(ledger, jobs[n % AT_A_TIME].id, n), at_a_time=AT_A_TIME)
                )
    base = statistics.median(figures["raw"])
    print(f"records of {len(value)} bytes; raw commits {base:.0f}/s")
    for name, words in (("one", "one transition at a time"), ("many", f"{AT_A_TIME} at a time")):
        ours = statistics.median(figures[name])
        ratio = statistics.median(mine / other for mine, other in zip(figures[name], figures["raw"], strict=True))
        print(f"{words}: {ours:.0f}/s, {ratio:.2f}x of raw commits (goal 0.5)")


class Raw:
    def __init__(self, path: Path, size_bytes: int) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE records (key TEXT PRIMARY KEY, value BLOB)")
        self._connection.execute("INSERT INTO records VALUES ('a', x'')")
        self._size_bytes = size_bytes

    def rate(self, count: int) -> float:
        begin_s = time.perf_counter()
        for _ in range(count):
            self._connection.execute("BEGIN IMMEDIATE")
            # Another value each time: SQLite writes nothing where nothing changes.
            value = os.urandom(self._size_bytes)
            self._connection.execute("UPDATE records SET value = ? WHERE key = 'a'", (value,))
            self._connection.execute("COMMIT")
        return count / (time.perf_counter() - begin_s)


def leased(job: Job, token: str) -> Job:
    return machine.lease(job, 1, Lease(token=token, worker="w", node="n", time_s=1.0), now_s=1.0)


async def turn(ledger: Ledger, job_id: str, number: int) -> None:
    """Lease the task, or give it back."""

    def event(job: Job) -> Job:
        lease = job.tasks[0].lease
        return machine.give_back(job, 1, lease.token, now_s=1.0) if lease else leased(job, f"{number:040}")

    await ledger.change(job_id, event)


async def rate(count: int, do: Callable[[int], Awaitable[None]], *, at_a_time: int) -> float:
    numbers = iter(range(count))

    async def some() -> None:
        for number in numbers:
            await do(number)

    begin_s = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(at_a_time)))
    return count / (time.perf_counter() - begin_s)


@asynccontextmanager
async def both() -> AsyncIterator[tuple[GatewayProcess, grpc.aio.Channel, grpc.aio.Channel]]:
    """A gateway and a bare server, each in its process, and a channel to each."""
    with tempfile.TemporaryDirectory() as folder:
        gateway = GatewayProcess(Path(folder) / "data", FANLIGHT_LOG_LEVEL="warning")
        bare = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.gateway_bare", stdout=asyncio.subprocess.PIPE
        )
        assert bare.stdout is not None
        try:
            await gateway.start()
            port = int(await bare.stdout.readline())
            async with gateway.channel() as ours, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as theirs:
                yield gateway, ours, theirs
        finally:
            bare.kill()
            await bare.wait()
            await gateway.stop()


async def lease(rounds: int) -> None:
    """From sending a job to its task in a waiting worker's hands, and an echo of the same bytes.

    Without a request id, and with one: that is one more write that is on the disk before the answer.
    """
    async with both() as (_, ours, theirs):
        jobs, worker = jobs_of(ours), RpcWorker(ours, "diffusion")
        await worker.lease(0)
        echo = theirs.unary_unary(f"/{SERVICE}/Echo")
        request = gateway_pb2.CreateJobRequest(generation=gateway_pb2.Generation(prompt="a red teapot"))
        data, echoes = request.SerializeToString(), []
        leases: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds * 40):
            polling = asyncio.ensure_future(worker.lease(1, wait_s=20.0))
            await asyncio.sleep(0.01)
            request.request_id = str(number) if number % 2 else ""
            begin_s = time.perf_counter()
            creating = asyncio.ensure_future(jobs.CreateJob(request))
            (task,) = await polling
            leases[number % 2].append(time.perf_counter() - begin_s)
            await creating
            await worker.complete(task)
            begin_s = time.perf_counter()
            await echo(data)
            echoes.append(time.perf_counter() - begin_s)
    told(leases[0], echoes, "submit to lease", "echo", goal=5.0)
    told(leases[1], echoes, "submit to lease with a request id", "echo", goal=5.0)


async def image(rounds: int) -> None:
    """An image up and down again: chunks in, and out to somebody else."""
    async with both() as (_, ours, theirs):
        blobs = blobs_pb2_grpc.BlobServiceStub(ours)
        take, give = theirs.stream_unary(f"/{SERVICE}/Take"), theirs.unary_stream(f"/{SERVICE}/Give")
        through, bare = [], []
        for _ in range(rounds * 10):
            data = PNG + os.urandom(IMAGE_BYTES)
            digest = digest_of(data)
            chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
            begin_s = time.perf_counter()
            header = blobs_pb2.WriteBlobHeader(digest=digest, size_bytes=len(data))
            parts = [blobs_pb2.WriteBlobRequest(header=header)]
            await blobs.WriteBlob(iter(parts + [blobs_pb2.WriteBlobRequest(chunk=chunk) for chunk in chunks]))
            async for _part in blobs.ReadBlob(blobs_pb2.ReadBlobRequest(digest=digest)):
                pass
            through.append(time.perf_counter() - begin_s)
            begin_s = time.perf_counter()
            await take(iter([digest.encode(), *chunks]))
            async for _part in give(digest.encode()):
                pass
            bare.append(time.perf_counter() - begin_s)
    told(through, bare, "467 kB image through the gateway", "bare forward", goal=1.7)


def told(ours: list[float], theirs: list[float], what: str, other: str, *, goal: float) -> None:
    mine, base = statistics.median(ours), statistics.median(theirs)
    print(f"{what}: p50 {mine * 1e3:.2f} ms; {other}: p50 {base * 1e3:.2f} ms; {mine / base:.2f}x (goal {goal})")


async def memory(rounds: int) -> None:
    """How much a gateway grows by jobs that wait with their pictures."""
    async with both() as (gateway, ours, _):
        assert gateway._process is not None
        process, jobs = psutil.Process(gateway._process.pid), jobs_of(ours)
        await RpcWorker(ours, "preprocess").lease(0)
        for number in range(20):
            await jobs.CreateJob(annotation(number))
        before = process.memory_info().rss
        for number in range(QUEUED):
            await jobs.CreateJob(annotation(number + 20))
        grown = process.memory_info().rss - before
    pictures = QUEUED * CONTROL_BYTES
    print(f"{QUEUED} jobs, {pictures / 1e6:.0f} MB of pictures: grown by {grown / 1e6:.1f} MB,", end=" ")
    print(f"{grown / pictures:.3f}x (goal 0.1)")


def annotation(number: int) -> gateway_pb2.CreateJobRequest:
    request = gateway_pb2.CreateJobRequest(request_id=str(number))
    request.annotation.annotator = "canny"
    request.annotation.picture.data = PNG + os.urandom(CONTROL_BYTES)
    return request


WHAT = {"sqlite": sqlite, "lease": lease, "image": image, "memory": memory}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    asyncio.run(WHAT[given.what](given.rounds))
