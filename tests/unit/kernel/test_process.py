"""A service's process ends on a signal, and when its parent process is gone."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from services.kernel.process import run

async def main(stop):
    print("running", flush=True)
    await stop.wait()
    print("stopped", flush=True)

sys.exit(run(main, lifeline_fd=int(sys.argv[1]) if len(sys.argv) > 1 else None))
"""


def start(*arguments, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, **options
    )
    assert process.stdout.readline() == "running\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(number):
    process = start()
    process.send_signal(number)

    assert process.communicate(timeout=20)[0] == "stopped\n"
    assert process.returncode == 0


REFUSED = """
import asyncio, sys
from services.kernel.config import ProcessEnd, SettingsError
from services.kernel.process import run

class Refused(ProcessEnd):
    exit_code = 78

async def fail(error):
    raise error

async def inner():
    async with asyncio.TaskGroup() as group:
        group.create_task(fail(Refused("the token is refused")))

async def main(stop):
    async with asyncio.TaskGroup() as group:
        group.create_task(inner())
        await stop.wait()

sys.exit(run(main))
"""


def test_an_error_with_an_exit_code_ends_it_with_that_code_and_one_line():
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (78, "", "error: the token is refused\n")


def test_it_stops_when_its_lifeline_breaks():
    reading, writing = os.pipe()
    process = start(str(reading), pass_fds=[reading])
    os.close(reading)
    os.close(writing)

    assert process.communicate(timeout=20)[0] == "stopped\n"
