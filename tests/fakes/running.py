"""A complete Fanlight, started as a user starts it: its processes, addresses, and how to kill one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

START_LIMIT_S = 180
WAIT_LIMIT_S = 240


@dataclass
class Running:
    """A `fanlight up` and the processes that it started."""

    process: subprocess.Popen
    grpc: str
    http: str
    data: Path

    def child(self, service: str) -> psutil.Process:
        """A service's current process; waits until there is one."""
        return until(lambda: next(iter(self._children(service)), None))

    def _children(self, service: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"services.{service}" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def kill(self, service: str) -> None:
        self.child(service).send_signal(signal.SIGKILL)


def until(condition, limit_s: float = WAIT_LIMIT_S):
    """The condition's first true value; fails instead of waiting forever."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s} s")


def start_up(data: Path, models: Path, **environment: str) -> Running:
    log = (data.parent / "up.log").open("w")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fanlight.cli.main",
            "up",
            "--data",
            str(data),
            "--http",
            "127.0.0.1:0",
            "--grpc",
            "127.0.0.1:0",
        ],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "FANLIGHT_DIFFUSION_MODELS": str(models), **environment},
    )
    line = process.stdout.readline()
    found = re.fullmatch(r"ready http=(\S+) grpc=(\S+)\n", line)
    assert found, f"said {line!r}; {(data.parent / 'up.log').read_text()[-3000:]}"
    return Running(process, grpc=found[2], http=f"http://{found[1]}", data=data)


def stop(running: Running) -> None:
    children = psutil.Process(running.process.pid).children(recursive=True)
    running.process.send_signal(signal.SIGTERM)
    try:
        running.process.wait(60)
    finally:
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        running.process.kill()
