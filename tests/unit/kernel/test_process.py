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


def test_it_stops_when_its_lifeline_breaks():
    reading, writing = os.pipe()
    process = start(str(reading), pass_fds=[reading])
    os.close(reading)
    os.close(writing)

    assert process.communicate(timeout=20)[0] == "stopped\n"
