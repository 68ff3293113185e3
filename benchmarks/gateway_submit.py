"""What a submit costs where many workers announce many models, over what it costs with one worker.

Two gateways of their own process take turns: one with one worker, one with many. Every worker announces other
capabilities: once other models each, once the same models and a limit of its own.

usage: python -m benchmarks.gateway_submit [--workers 200] [--models 1000] [--rounds 20]
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import psutil

from benchmarks.figures import RATIO, Report, arguments
from benchmarks.serving import cpu_s
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.gateway.v1 import gateway_pb2
from fanlight.queue.v1 import queue_pb2, queue_pb2_grpc
from tests.fakes.gateway_process import GatewayProcess, jobs_of

GOAL = 1.5
# Submits of each gateway before the other takes its turn.
TURN = 10
# Of a worker's models; the rest are checkpoints.
LORAS, EMBEDDINGS = 0.6, 0.1
PROMPT = "a red teapot on a wooden table, morning light"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Medians of a submit: the client's wall time, and the CPU time of the gateway's process."""

    wall_s: float
    cpu_s: float


def capabilities(worker: int, models: int, *, shared: bool) -> queue_pb2.Capabilities:
    prefix = "m" if shared else f"m{worker}-"
    names = [f"{prefix}{number}" for number in range(models)]
    kinds = [
        "lora" if i < LORAS * models else "embedding" if i < (LORAS + EMBEDDINGS) * models else "checkpoint"
        for i in range(models)
    ]
    return queue_pb2.Capabilities(
        models=[
            diffusion_pb2.Model(
                id=name, kind=kind, family="sd1", size_bytes=10**8, aliases=[f"org/{name}", f"{name}.safetensors"]
            )
            for name, kind in zip(names, kinds, strict=True)
        ],
        limits=[queue_pb2.Limit(name="pixels", maximum=2**22 + worker)],
    )


async def announce(channel: grpc.aio.Channel, worker: int, models: int, *, shared: bool) -> None:
    announced = capabilities(worker, models, shared=shared)
    held = [model.id for model in announced.models][-models // 10 :]
    request = queue_pb2.LeaseTasksRequest(
        worker=queue_pb2.Worker(id=f"w{worker}", node=f"n{worker}", stage="diffusion", disk_models=held),
        capabilities_digest=str(worker).encode(),
        capabilities=announced,
    )
    await queue_pb2_grpc.QueueServiceStub(channel).LeaseTasks(request)


@dataclass(frozen=True)
class House:
    jobs: Any
    process: psutil.Process
    # Checkpoints to ask for.
    checkpoints: Sequence[str]

    async def submit(self, number: int) -> float:
        work = diffusion_pb2.GenerateRequest(
            model=self.checkpoints[number % len(self.checkpoints)] if number % 2 else "",
            prompt=PROMPT,
            width_px=512,
            height_px=512,
        )
        begin_s = time.perf_counter()
        await self.jobs.CreateJob(gateway_pb2.CreateJobRequest(generation=work))
        return time.perf_counter() - begin_s


@asynccontextmanager
async def house(workers: int, models: int, *, shared: bool) -> AsyncIterator[House]:
    with tempfile.TemporaryDirectory() as folder:
        gateway = GatewayProcess(Path(folder) / "data", FANLIGHT_LOG_LEVEL="warning")
        try:
            await gateway.start()
            async with gateway.channel() as channel:
                for worker in range(workers):
                    await announce(channel, worker, models, shared=shared)
                held = [model.id for model in capabilities(0, models, shared=shared).models][-models // 10 :]
                assert gateway._process is not None
                yield House(jobs_of(channel), psutil.Process(gateway._process.pid), held)
        finally:
            await gateway.stop()


async def submit_costs(workers: int, models: int, rounds: int, *, shared: bool) -> tuple[Costs, Costs]:
    """With one worker, and with that many."""
    walls: tuple[list[float], list[float]] = ([], [])
    spent: tuple[list[float], list[float]] = ([], [])
    async with house(1, models, shared=shared) as one, house(workers, models, shared=shared) as many:
        for turn in range(rounds + 1):
            for which, each in enumerate((one, many)):
                before_s = cpu_s(each.process.pid)
                taken = [await each.submit(turn * TURN + i) for i in range(TURN)]
                # The first turn warms up.
                if turn:
                    walls[which].extend(taken)
                    spent[which].append((cpu_s(each.process.pid) - before_s) / TURN)
    first, second = (
        Costs(wall_s=statistics.median(wall), cpu_s=statistics.median(cpu))
        for wall, cpu in zip(walls, spent, strict=True)
    )
    return first, second


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--models", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args(argv)
    workers, models, rounds = (3, 20, 2) if asked.smoke else (asked.workers, asked.models, asked.rounds)
    report = Report()
    for shared in (False,) if asked.smoke else (False, True):
        one, many = asyncio.run(submit_costs(workers, models, rounds, shared=shared))
        what = f"submit beside {workers} workers of {models:,} {'equal models' if shared else 'models of their own'}"
        against = "one worker"
        report.add(f"{what}, what a client waits", many.wall_s / one.wall_s, RATIO, against=against, goal=GOAL)
        report.add(f"{what}, CPU", many.cpu_s / one.cpu_s, RATIO, against=against, goal=GOAL)
        report.add(f"{what}, what a client waits", many.wall_s * 1e3, "ms")
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
