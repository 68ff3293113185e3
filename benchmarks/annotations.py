"""CPU seconds for one small annotation over HTTP, by process: canny of distinct 512 x 512 JPEGs.

With `--before FOLDER`, a checkout of an older commit, that one is measured beside this one, in turns, and the ratio is
given: CPU seconds hardly depend on what else the machine does.
Run: `python -m benchmarks.annotations [--rounds 5] [--before FOLDER]`.
"""

import io
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.figures import Report, arguments
from benchmarks.serving import END_LIMIT_S, clean_environment, cpu_s

ROOT = Path(__file__).parents[1]
SIDE_PX = 512
TURN_CALLS, CLIENTS = 40, 4
READY_LIMIT_S = 60.0
GATEWAY_GOAL_MS = 4.5
PROCESSES = ("gateway", "preprocessor")


def photos() -> Iterator[bytes]:
    """No two are equal, so that none is in the control cache."""
    photo = Image.open(ROOT / "demo" / "photos" / "coffee.jpg").resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    pixels = np.asarray(photo.convert("RGB"))
    for number in count():
        changed = pixels.copy()
        changed[0, :32] = np.unpackbits(np.frombuffer(number.to_bytes(4, "big"), np.uint8))[:, None] * 255
        stream = io.BytesIO()
        Image.fromarray(changed).save(stream, "JPEG", quality=92)
        yield stream.getvalue()


@contextmanager
def started(folder: Path, service: str, environment: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """A service of that checkout: its process id, and the addresses of its ready line."""
    environ = clean_environment(PYTHONPATH=str(folder), **environment)
    command = [sys.executable, "-m", f"services.{service}"]
    with subprocess.Popen(
        command, env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if not ready.startswith("ready "):
                raise SystemExit(f"error: {service} of {folder} did not start")
            yield process.pid, dict(pair.split("=", 1) for pair in ready.split()[1:])
        finally:
            process.terminate()
            process.wait(END_LIMIT_S)


@dataclass(kw_only=True)
class Version:
    """Gateway and preprocessor of one checkout, and the CPU seconds of each turn by process."""

    url: str
    pids: Mapping[str, int]
    used_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PROCESSES})

    def turn(self, images: list[bytes]) -> None:
        before = {name: cpu_s(pid) for name, pid in self.pids.items()}
        with ThreadPoolExecutor(CLIENTS) as clients:
            for answer in clients.map(self.annotate, images):
                assert answer.startswith(b"\x89PNG")
        for name, pid in self.pids.items():
            self.used_s[name].append((cpu_s(pid) - before[name]) / len(images))

    def annotate(self, image: bytes) -> bytes:
        with urllib.request.urlopen(f"{self.url}/v1/annotate/canny", image, timeout=READY_LIMIT_S) as answer:
            data: bytes = answer.read()
            return data

    def wait(self, image: bytes) -> None:
        """Until the preprocessor has joined."""
        end_s = time.monotonic() + READY_LIMIT_S
        while True:
            try:
                self.annotate(image)
                return
            except OSError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.2)


def version(stack: ExitStack, folder: Path) -> Version:
    data = stack.enter_context(tempfile.TemporaryDirectory())
    any_port = "127.0.0.1:0"
    gateway, addresses = stack.enter_context(
        started(
            folder,
            "gateway",
            {
                "FANLIGHT_GATEWAY_DATA_DIR": data,
                "FANLIGHT_GATEWAY_HTTP": any_port,
                "FANLIGHT_GATEWAY_GRPC": any_port,
            },
        )
    )
    worker = {"FANLIGHT_WORKER_GATEWAY": addresses["grpc"], "FANLIGHT_PREPROCESSOR_GRPC": any_port}
    preprocessor, _ = stack.enter_context(started(folder, "preprocessor", worker))
    return Version(url=f"http://{addresses['http']}", pids={"gateway": gateway, "preprocessor": preprocessor})


def measure(sides: Sequence[Version], rounds: int, calls: int) -> None:
    """The first turn of each is not counted: it warms up."""
    images = photos()
    for side in sides:
        side.wait(next(images))
    for _ in range(rounds + 1):
        for side in sides:
            side.turn([next(images) for _ in range(calls)])
    for side in sides:
        for taken in side.used_s.values():
            del taken[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout of an older commit")
    asked = parser.parse_args(argv)
    report = Report()
    with ExitStack() as stack:
        now = version(stack, ROOT)
        before = version(stack, asked.before.absolute()) if asked.before else None
        sides = [each for each in (now, before) if each]
        measure(sides, 1 if asked.smoke else asked.rounds, 4 if asked.smoke else TURN_CALLS)
    for name in PROCESSES:
        what, goal = f"CPU of one annotation, {name}", GATEWAY_GOAL_MS if name == "gateway" else None
        report.add(what, [each * 1e3 for each in now.used_s[name]], "ms", goal=goal)
        if before:
            report.add(what, [each * 1e3 for each in before.used_s[name]], "ms", column="before")
            report.ratio(what, now.used_s[name], before.used_s[name], against="before")
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
