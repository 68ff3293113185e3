"""What liars cost the honest workers beside them: tasks for each CPU second of the honest processes, alone and among
liars.

usage: python -m benchmarks.chaos_honest [--seconds N] [--rounds N]. The workers, liars and clients of the chaos run;
nothing is killed or cut, so that a process's CPU can be read. Clients keep more jobs open than the honest workers can
do, and the rounds take turns.
"""

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.chaos import Seen, revive, send_jobs
from benchmarks.chaos_house import START_S, House, Member
from benchmarks.chaos_liars import LIARS
from benchmarks.figures import RATIO, Report, arguments
from benchmarks.serving import cpu_s
from fanlight.gateway.v1.gateway_pb2 import Task

HONEST = (0, 5)
CLIENTS = 4
# Until every worker has come, and liars that are proven wrong at once are known.
WARM_UP_S = 15.0
GOAL = 0.9


async def tasks_per_cpu_s(folder: Path, seconds: float, warm_up_s: float, liars: Mapping[int, str]) -> float:
    house = House(folder, gateways=1, workers=sorted({*HONEST, *liars}), liars=liars)
    seen, stop = Seen(), asyncio.Event()
    try:
        await house.start()
        honest = [each for each in house.workers if int(each.name.rpartition("-")[2]) in HONEST]
        async with house.client() as client, asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(send_jobs(client, number, seen, stop, random.Random(number)))
            group.create_task(revive(house, stop))
            async with asyncio.timeout(START_S):
                while not seen.ended:  # noqa: ASYNC110  # clients tell nobody
                    await asyncio.sleep(0.2)
            await asyncio.sleep(warm_up_s)
            begin_s, used_s = time.time(), _cpu_s(honest)
            await asyncio.sleep(seconds)
            end_s, used_s = time.time(), _cpu_s(honest) - used_s
            nodes = {each.id for each in await client.nodes.list() if each.subject in {one.name for one in honest}}
            stop.set()
        made = [
            task
            for job in seen.ended.values()
            for task in job.tasks
            if task.node in nodes and task.state == Task.STATE_SUCCEEDED and begin_s <= _ended_s(task) < end_s
        ]
        return len(made) / used_s
    finally:
        await house.end()


def _cpu_s(members: Sequence[Member]) -> float:
    return sum(cpu_s(each.child.pid) for each in members if each.child is not None)


def _ended_s(task: Task) -> float:
    return task.end_time.seconds + task.end_time.nanos / 1e9


async def measure(seconds: float, rounds: int, warm_up_s: float) -> tuple[list[float], list[float]]:
    alone: list[float] = []
    among: list[float] = []
    for _ in range(rounds):
        for liars, found in (({}, alone), (LIARS, among)):
            folder = Path(tempfile.mkdtemp(prefix="chaos-honest-"))
            try:
                found.append(await tasks_per_cpu_s(folder, seconds, warm_up_s, liars))
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return alone, among


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(argv)
    seconds, rounds, warm_up_s = (5.0, 1, 0.0) if asked.smoke else (asked.seconds, asked.rounds, WARM_UP_S)
    report = Report()
    alone, among = asyncio.run(measure(seconds, rounds, warm_up_s))
    report.add("tasks of honest workers for each of their CPU seconds, alone", alone, "")
    report.add("tasks of honest workers for each of their CPU seconds, among five liars", among, "")
    ratios = [ours / theirs for ours, theirs in zip(among, alone, strict=True)]
    goal = None if asked.smoke else GOAL
    report.add("the same", ratios, RATIO, against="alone", goal=goal, at_least=True)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
