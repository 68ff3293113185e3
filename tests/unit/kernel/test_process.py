"""A service's process ends on a signal, and when its parent process is gone."""

import gc
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from services.kernel.process import long_imports

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


def test_what_long_imports_make_is_never_searched_for_garbage():
    made, before = [], gc.get_freeze_count()
    try:
        with suppress(ImportError), long_imports():
            assert not gc.isenabled()
            made += [[] for _ in range(1000)]
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(made)
        gc.disable()
        with long_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_diffusion_service_starts_without_what_few_need():
    rare = ("PIL.AvifImagePlugin", "services.worker.siblings", "services.diffusion.models.embedding_pickles", "torch")
    program = f"import sys, services.diffusion.__main__; print([name for name in {rare} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
