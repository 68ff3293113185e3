"""What the gateway costs: over SQLite's own commits, over a bare grpc.aio server, and in memory.

usage: python -m benchmarks.gateway sqlite|lease|image|sealed|memory [--rounds 5]. Ours and the other take turns.
"""

import asyncio
import itertools
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from benchmarks.figures import RATIO, Report, arguments
from benchmarks.gateway_bare import CHUNK_BYTES, SERVICE
from benchmarks.serving import cpu_s
from fanlight.blobs.v1 import blobs_pb2, blobs_pb2_grpc
from fanlight.client import requests
from fanlight.contract.names import digest_of
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.__main__ import SystemClock
from services.gateway.adapters.sqlite_store import open_sqlite_store
from services.gateway.app.job_store import JOBS, JobStore
from services.gateway.app.records import Records
from services.gateway.domain import machine, plan
from services.gateway.domain.job import Job, Lease
from tests.fakes.gateway_process import GatewayProcess, RpcWorker, jobs_of
from tests.fakes.jobs import generation

# A header of 256 x 192 pixels, which is all of an image that the gateway reads.
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x01\0\0\0\0\xc0\x08\x02\0\0\0"
IMAGE_BYTES = 467_000
CONTROL_BYTES = 425_000
QUEUED = 1_000
AT_A_TIME = 16
IMAGES_A_TURN = 10
# Of this size, in the memory of a gateway.
CACHED_IMAGES = 36
# Of a run, for the range of its medians.
PARTS = 5


def a_job(number: int) -> Job:
    request = diffusion_pb2.GenerateRequest(
        model="starter", prompt="a red teapot on a wooden table, morning light " * 4
    )
    patch = diffusion_pb2.GenerateRequest(seed=1, count=1).SerializeToString()
    work = plan.JobPlan(
        requests=(generation(request.SerializeToString()),), tasks=(plan.NewTask(request=0, patch=patch),)
    )
    return plan.create(work, job_id=f"{number:06}", request_id="", priority=0, now_s=1.0)


async def sqlite(rounds: int, report: Report, *, smoke: bool) -> None:
    """Transitions of jobs, one and sixteen at a time, and commits of records of the same size."""
    with tempfile.TemporaryDirectory() as folder:
        async with open_sqlite_store(Path(folder) / "ours.sqlite") as store:
            ledger = JobStore(Records(store, SystemClock()))
            jobs = [await ledger.create(a_job(number)) for number in range(AT_A_TIME)]
            value = JOBS.encode(leased(jobs[0], "t" * 40))
            raw = Raw(Path(folder) / "raw.sqlite", len(value))
            figures: dict[str, list[float]] = {"raw": [], "one": [], "many": []}
            # Short turns and many: a disk's own mood changes within seconds.
            for _ in range(1 if smoke else 10 * rounds):
                figures["raw"].append(raw.rate(20))
                figures["one"].append(await rate(20, lambda n: turn(ledger, jobs[0].id, n), at_a_time=1))
                figures["many"].append(
                    await rate(80, lambda n: turn(ledger, jobs[n % AT_A_TIME].id, n), at_a_time=AT_A_TIME)
                )
    against = "raw SQLite commits of records of that size, per second"
    for name, words in (("one", "one at a time"), ("many", f"{AT_A_TIME} at a time, sharing commits")):
        what = f"job transitions, {words}, durable, per second"
        report.ratio(what, figures[name], figures["raw"], against=against, goal=0.5, at_least=True)
    report.add(f"raw commits of {len(value)} bytes", figures["raw"], "per second")


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


async def turn(ledger: JobStore, job_id: str, number: int) -> None:
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


@dataclass(frozen=True)
class House:
    """A gateway, a bare server and one that it forwards to, each in its process."""

    gateway: GatewayProcess
    ours: grpc.aio.Channel
    theirs: grpc.aio.Channel
    bare: asyncio.subprocess.Process

    @property
    def gateway_pid(self) -> int:
        assert self.gateway._process is not None
        return self.gateway._process.pid


@asynccontextmanager
async def bare_server(*onward: int) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    command = [sys.executable, "-m", "benchmarks.gateway_bare", *map(str, onward)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process, int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def both() -> AsyncIterator[House]:
    with tempfile.TemporaryDirectory() as folder:
        gateway = GatewayProcess(Path(folder) / "data", FANLIGHT_LOG_LEVEL="warning")
        try:
            await gateway.start()
            async with (
                bare_server() as (_, end),
                bare_server(end) as (bare, port),
                gateway.channel() as ours,
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as theirs,
            ):
                yield House(gateway=gateway, ours=ours, theirs=theirs, bare=bare)
        finally:
            await gateway.stop()


async def lease(rounds: int, report: Report, *, smoke: bool) -> None:
    """From sending a job to its task in a waiting worker's hands, and an echo of the same bytes.

    Without a request id, and with one: that is one more write that is on the disk before the answer.
    """
    async with both() as house:
        jobs: Any = jobs_of(house.ours)
        worker = RpcWorker(house.ours, "diffusion")
        await worker.lease(0)
        echo: Any = house.theirs.unary_unary(f"/{SERVICE}/Echo")
        request = gateway_pb2.CreateJobRequest(generation=requests.generation("a red teapot"))
        data, echoes = request.SerializeToString(), []
        leases: tuple[list[float], list[float]] = ([], [])
        for number in range(4 if smoke else rounds * 40):
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
    for times, how in zip(leases, ("", " with a request id"), strict=True):
        compare(report, times, echoes, f"submit to lease{how}, p50", "an echo by bare grpc.aio", goal=5.0)


async def image(rounds: int, report: Report, *, smoke: bool) -> None:
    """An image from a worker to a client: up to the gateway, durable there, and down again.

    Beside it the same bytes in the same chunks through a bare forwarder: over it to another server, whose answer comes
    back; and up to a bare server that keeps them in memory, and down again. Wall time, and the CPU time of the process
    in the middle.
    """
    async with both() as house:
        gateway, bare = house.gateway_pid, house.bare.pid
        walls: dict[str, list[float]] = {"ours": [], "forward": [], "kept": []}
        spent: dict[str, list[float]] = {"ours": [], "forward": [], "kept": []}
        for turn_number in range(2 if smoke else rounds * 4 + 1):
            for name, pid, carry in (
                ("ours", gateway, ours_carries),
                ("forward", bare, forwards),
                ("kept", bare, keeps),
            ):
                before_s = cpu_s(pid)
                turn_walls = [await carry(house) for _ in range(IMAGES_A_TURN)]
                # The first turn makes connections and folders.
                if turn_number:
                    walls[name] += turn_walls
                    spent[name].append((cpu_s(pid) - before_s) / IMAGES_A_TURN)
    for other, goal in (("forward", 1.7), ("kept", None)):
        what = "a 467 kB image from a worker to a client"
        compare(report, walls["ours"], walls[other], f"{what}, wall, p50", f"bare {other}", goal=goal)
        report.ratio(f"{what}, CPU in the middle", spent["ours"], spent[other], against=f"bare {other}")
    report.add("CPU of the gateway for an image", [each * 1e3 for each in spent["ours"]], "ms")


@asynccontextmanager
async def gateway_alone(name: str, **settings: str) -> AsyncIterator[tuple[GatewayProcess, grpc.aio.Channel]]:
    with tempfile.TemporaryDirectory() as folder:
        if name == "sealed":
            (Path(folder) / "key").write_text(os.urandom(32).hex())
            settings["FANLIGHT_GATEWAY_SEAL_KEY_FILE"] = str(Path(folder) / "key")
        gateway = GatewayProcess(Path(folder) / "data", FANLIGHT_LOG_LEVEL="warning", **settings)
        try:
            await gateway.start()
            async with gateway.channel() as channel:
                yield gateway, channel
        finally:
            await gateway.stop()


async def sealed(rounds: int, report: Report, *, smoke: bool) -> None:
    """The image's way through a gateway that seals, and through one that does not; then reads of what the disk has.

    Also jobs, whose records are sealed. The two take turns with each image and job.
    """
    async with gateway_alone("clear") as clear, gateway_alone("sealed") as sealing:
        sides = {"clear": clear, "sealed": sealing}
        figures: dict[str, dict[str, list[float]]] = {way: {each: [] for each in sides} for way in SEALED_WAYS}
        for turn_number in range(2 if smoke else rounds * 4 + 1):
            found = await sealed_turn(sides, smoke=smoke)
            # The first turn makes connections and folders.
            if turn_number:
                for way, name in itertools.product(SEALED_WAYS, sides):
                    figures[way][name] += found[way][name]
    for way, (what, goal) in SEALED_WAYS.items():
        ours, theirs = figures[way]["sealed"], figures[way]["clear"]
        compare(report, ours, theirs, f"sealed: {what}", "the same in clear", goal=goal)


# What is measured, and the goal.
SEALED_WAYS: dict[str, tuple[str, float | None]] = {
    "carry": ("a 467 kB image from a worker to a client, wall, p50", 1.25),
    "cpu": ("a 467 kB image from a worker to a client, CPU of the gateway", None),
    "disk": ("a 467 kB image that a client reads from the disk, wall, p50", None),
    "jobs": ("a job created, wall, p50", None),
}
Sides = dict[str, tuple[GatewayProcess, grpc.aio.Channel]]


async def sealed_turn(sides: Sides, *, smoke: bool) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in sides} for way in SEALED_WAYS}
    before = {name: cpu_s(pid_of(gateway)) for name, (gateway, _) in sides.items()}
    for name, (_, channel) in list(sides.items()) * IMAGES_A_TURN:
        found["carry"][name].append(await carry_image(channel))
    for name, (gateway, _) in sides.items():
        found["cpu"][name].append((cpu_s(pid_of(gateway)) - before[name]) / IMAGES_A_TURN)
    digests: dict[str, list[str]] = {name: [] for name in sides}
    # More than a gateway caches in memory.
    for name, (_, channel) in list(sides.items()) * (IMAGES_A_TURN + (0 if smoke else CACHED_IMAGES)):
        digests[name].append(await write_image(channel))
    for number in range(IMAGES_A_TURN):
        for name, (_, channel) in sides.items():
            found["disk"][name].append(await read_image(channel, digests[name][number]))
    for _, channel in sides.values():
        await RpcWorker(channel, "diffusion").lease(0)
    for name, (_, channel) in list(sides.items()) * IMAGES_A_TURN:
        found["jobs"][name].append(await create_job(channel))
    return found


def pid_of(gateway: GatewayProcess) -> int:
    assert gateway._process is not None
    return gateway._process.pid


async def read_image(channel: grpc.aio.Channel, digest: str) -> float:
    blobs = blobs_pb2_grpc.BlobServiceStub(channel)
    begin_s = time.perf_counter()
    async for _part in blobs.ReadBlob(blobs_pb2.ReadBlobRequest(digest=digest)):
        pass
    return time.perf_counter() - begin_s


async def create_job(channel: grpc.aio.Channel) -> float:
    jobs: Any = jobs_of(channel)
    request = gateway_pb2.CreateJobRequest(generation=requests.generation("a red teapot on a table, " * 4))
    begin_s = time.perf_counter()
    job = await jobs.CreateJob(request)
    passed_s = time.perf_counter() - begin_s
    await jobs.CancelJob(gateway_pb2.CancelJobRequest(name=job.name))
    return passed_s


async def write_image(channel: grpc.aio.Channel) -> str:
    data = PNG + os.urandom(IMAGE_BYTES)
    header = blobs_pb2.WriteBlobHeader(size_bytes=len(data))
    parts = [blobs_pb2.WriteBlobRequest(header=header)]
    parts += [blobs_pb2.WriteBlobRequest(chunk=chunk) for chunk in chunks_of(data)]
    return (await blobs_pb2_grpc.BlobServiceStub(channel).WriteBlob(iter(parts))).blob.digest


async def ours_carries(house: House) -> float:
    return await carry_image(house.ours)


async def carry_image(channel: grpc.aio.Channel) -> float:
    blobs = blobs_pb2_grpc.BlobServiceStub(channel)
    data = PNG + os.urandom(IMAGE_BYTES)
    # The worker's digest and the client's check are no part of the way.
    digest = digest_of(data)
    begin_s = time.perf_counter()
    header = blobs_pb2.WriteBlobHeader(digest=digest, size_bytes=len(data))
    parts = [blobs_pb2.WriteBlobRequest(header=header)]
    parts += [blobs_pb2.WriteBlobRequest(chunk=chunk) for chunk in chunks_of(data)]
    await blobs.WriteBlob(iter(parts))
    async for _part in blobs.ReadBlob(blobs_pb2.ReadBlobRequest(digest=digest)):
        pass
    return time.perf_counter() - begin_s


async def forwards(house: House) -> float:
    forward: Any = house.theirs.stream_unary(f"/{SERVICE}/Forward")
    data = PNG + os.urandom(IMAGE_BYTES)
    begin_s = time.perf_counter()
    await forward(iter(chunks_of(data)))
    return time.perf_counter() - begin_s


async def keeps(house: House) -> float:
    take: Any = house.theirs.stream_unary(f"/{SERVICE}/Take")
    give: Any = house.theirs.unary_stream(f"/{SERVICE}/Give")
    data = PNG + os.urandom(IMAGE_BYTES)
    name = data[:40]
    begin_s = time.perf_counter()
    await take(iter([name, *chunks_of(data)]))
    async for _part in give(name):
        pass
    return time.perf_counter() - begin_s


def chunks_of(data: bytes) -> list[bytes]:
    return [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]


def compare(
    report: Report, ours: list[float], theirs: list[float], what: str, against: str, *, goal: float | None
) -> None:
    """The ratio of medians, in each part of the run: their median and their range."""
    count = min(PARTS, len(ours), len(theirs))
    report.ratio(what, _medians(ours, count), _medians(theirs, count), against=against, goal=goal)


def _medians(times: list[float], count: int) -> list[float]:
    return [statistics.median(times[len(times) * n // count : len(times) * (n + 1) // count]) for n in range(count)]


async def memory(rounds: int, report: Report, *, smoke: bool) -> None:
    """How much a gateway grows by jobs that wait with their images."""
    queued = 20 if smoke else QUEUED
    async with both() as house:
        jobs: Any = jobs_of(house.ours)
        process = psutil.Process(house.gateway_pid)
        await RpcWorker(house.ours, "preprocess").lease(0)
        for number in range(20):
            await jobs.CreateJob(annotation(number))
        before = process.memory_info().rss
        for number in range(queued):
            await jobs.CreateJob(annotation(number + 20))
        grown = process.memory_info().rss - before
    what, sent = f"memory for {queued:,} queued jobs with 425 kB images", queued * CONTROL_BYTES
    report.add(what, grown / sent, RATIO, against="the images' bytes", goal=0.1)


def annotation(number: int) -> gateway_pb2.CreateJobRequest:
    work = requests.annotation("canny", PNG + os.urandom(CONTROL_BYTES))
    return gateway_pb2.CreateJobRequest(request_id=str(number), annotation=work)


WHAT: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "sqlite": sqlite,
    "lease": lease,
    "image": image,
    "sealed": sealed,
    "memory": memory,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(argv)
    report = Report()
    asyncio.run(WHAT[asked.what](asked.rounds, report, smoke=asked.smoke))
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
