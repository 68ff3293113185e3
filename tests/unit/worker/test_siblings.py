"""Further worker processes beside a worker: as many as help, restarted one by one, gone when it is."""

import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest

from fanlight.machine import Machine
from services.worker.siblings import ANY_PORT, Siblings
from tests.fakes.running import until

LIMIT_S = 60
HERE = Machine(cores=3.0, memory_bytes=10**10, available_bytes=10**10)
# Writes what it was given, and lives until its lifeline ends or it is terminated.
SCRIPT = """
import os, sys
names = ("FANLIGHT_DIFFUSION_GRPC", "FANLIGHT_WORKER_PROCESSES", "FANLIGHT_DIFFUSION_DEVICE", "OMP_NUM_THREADS")
with open(os.environ["DIARY"], "a") as file:
    print(os.getpid(), *(os.environ.get(name, "-") for name in names), file=file)
while os.read(int(os.environ["FANLIGHT_LIFELINE_FD"]), 64):
    pass
"""


@pytest.fixture
def diary(tmp_path):
    return tmp_path / "diary"


@pytest.fixture
def siblings(diary):
    def make(processes: str) -> Siblings:
        async def sleep(pause_s: float) -> None:
            made.slept_s.append(pause_s)

        environ = {"DIARY": str(diary), "FANLIGHT_DIFFUSION_GRPC": "0.0.0.0:50053"}
        made = Siblings(
            "diffusion",
            processes,
            grace_s=LIMIT_S,
            environ=environ,
            command=(sys.executable, "-SE", "-c", SCRIPT),
            machine=lambda: HERE,
            sleep=sleep,
        )
        made.slept_s = []
        return made

    return make


def lines(diary) -> list[list[str]]:
    return [line.split() for line in diary.read_text().splitlines()] if diary.exists() else []


async def seen(condition) -> None:
    await asyncio.to_thread(until, condition, LIMIT_S)


async def stopped(running: asyncio.Task) -> None:
    running.cancel()
    await asyncio.wait({running}, timeout=LIMIT_S)
    assert running.done()


@pytest.mark.parametrize(
    ("processes", "cores", "cards", "further"),
    [
        ("auto", 1.0, 0, [("-", "1"), ("-", "1")]),
        ("2", 3.0, 0, [("-", "1")]),
        ("auto", 1.0, 2, [("cuda:1", "-")]),
    ],
)
async def test_as_many_as_help_run_with_ports_and_shares_of_their_own(
    siblings, diary, processes, cores, cards, further
):
    running = asyncio.create_task(siblings(processes).run(asyncio.Event(), cores=cores, cards=cards))
    await seen(lambda: len(lines(diary)) == len(further))
    await stopped(running)

    assert [(words[3], words[4]) for words in lines(diary)] == further
    assert all(words[1:3] == [ANY_PORT, "1"] for words in lines(diary))
    assert not any(psutil.pid_exists(int(words[0])) for words in lines(diary))


@pytest.mark.parametrize(("processes", "cores"), [("1", 1.0), ("auto", 2.9)])
async def test_where_none_helps_none_is_started(siblings, diary, processes, cores):
    stop = asyncio.Event()
    stop.set()
    await asyncio.wait_for(siblings(processes).run(stop, cores=cores), LIMIT_S)

    assert lines(diary) == []


async def test_they_stop_with_this_worker_and_not_after_it(siblings, diary):
    stop = asyncio.Event()
    running = asyncio.create_task(siblings("2").run(stop))
    await seen(lambda: len(lines(diary)) == 1)
    stop.set()
    await asyncio.wait_for(running, LIMIT_S)

    assert not psutil.pid_exists(int(lines(diary)[0][0]))


async def test_one_that_died_is_started_again(siblings, diary):
    made = siblings("2")
    running = asyncio.create_task(made.run(asyncio.Event()))
    for count in (1, 2, 3):
        await seen(lambda count=count: len(lines(diary)) == count)
        if count < 3:
            os.kill(int(lines(diary)[-1][0]), signal.SIGKILL)
    await stopped(running)

    assert made.slept_s == [1.0, 2.0]


def test_they_end_with_a_worker_that_was_killed(diary):
    parent = f"""
import asyncio, sys
from services.worker.siblings import Siblings
command = (sys.executable, "-SE", "-c", {SCRIPT!r})
made = Siblings("diffusion", "2", grace_s=9, environ={{"DIARY": {str(diary)!r}}}, command=command)
asyncio.run(made.run(asyncio.Event()))
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until(lambda: len(lines(diary)) == 1, LIMIT_S)
    process.kill()
    process.wait(LIMIT_S)

    until(lambda: not psutil.pid_exists(int(lines(diary)[0][0])), LIMIT_S)
