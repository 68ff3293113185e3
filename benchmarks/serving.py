"""Services as processes of their own, with their own defaults, for benchmarks that ask them as a client does."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

END_LIMIT_S = 30.0


def clean_environment(**more: str) -> dict[str, str]:
    """This process's, without settings of Fanlight that a developer may have."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FANLIGHT_")} | more


@contextmanager
def served(*what: str, **environment: str) -> Iterator[tuple[int, str]]:
    """A Python process that prints `ready NAME=ADDRESS`: its process id, and that address."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *what],
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if not ready.startswith("ready "):
                raise SystemExit(f"error: {' '.join(what)} did not start")
            yield process.pid, ready.split()[1].partition("=")[2]
        finally:
            process.terminate()
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, all its threads, to the nanosecond; psutil's are counted in hundredths of seconds."""
    return time.clock_gettime(~pid << 3 | 2)
