"""From exec of the diffusion process to its first image, with all weights still to fetch over a home link.

The store is empty. A repository in SD 1.5's file layout (random fp16 weights, its own tokenizer; a fifth as wide, and
`--full` as wide as SD 1.5) is served as a hub does at the far end of benchmarks.link_emulator. The process preloads it;
a client in the same network asks for an image of two steps, 64 x 64, as soon as the port answers. The goal is at most
1.1 times what the link takes for the bytes at its rate, plus 5 s. Needs root.
Run: `python -m benchmarks.first_image [--full] [--mbps 100] [--rtt-ms 20] [--rounds 2] [--keep FOLDER]`.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from benchmarks.figures import Report, arguments
from benchmarks.link_emulator import LinkEmulator, Shape, why_not
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc

if TYPE_CHECKING:
    from benchmarks.models import Size

ROOT = Path(__file__).parent.parent
PORT = 8080
GRPC = "127.0.0.1:50053"
REPO = "bench/model"
PATIENCE_S = 300.0
SMOKE_MBPS = 2_000.0
GOAL_TIMES, GOAL_MORE_S = 1.1, 5.0


def make(folder: Path, *, size: "Size") -> None:
    """The repository's files, as save_pretrained writes them."""
    import torch

    from benchmarks.models import make_pipeline

    pipeline = make_pipeline(folder, size=size, seed=0)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True, variant="fp16")


def serve(folder: Path, host: str) -> None:
    from tests.fakes.range_server import RangeServer
    from tests.fakes.weight_sites import put_repository

    os.nice(-10)
    with RangeServer(host, PORT, send_buffer_bytes=0) as server:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        put_repository(server, REPO, files)
        print("ready", flush=True)
        sys.stdin.read()


def ask() -> None:
    """One image as soon as there is somebody to ask; when what happened, on time.perf_counter."""
    request = diffusion_pb2.GenerateRequest(
        prompt="a red apple on a blue background", model=f"hf:{REPO}", seed=1, steps=2, width_px=64, height_px=64
    )
    at: dict[str, float] = {}
    with grpc.insecure_channel(GRPC, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = diffusion_pb2_grpc.DiffusionServiceStub(channel)
        print("ready", flush=True)
        sys.stdin.readline()
        grpc.channel_ready_future(channel).result(timeout=PATIENCE_S)
        at["port"] = time.perf_counter()
        for answer in stub.Generate(request, timeout=PATIENCE_S):
            event = answer.WhichOneof("event")
            assert event is not None
            at["bytes" if event == "fetch" else event] = time.perf_counter()
            if event == "fetch":
                fetched = answer.fetch.total_bytes
            elif event == "done":
                spans = {span.name: span.duration_s for span in answer.done.spans}
    print(json.dumps({"at": at, "fetched": fetched, "spans": spans}), flush=True)


@contextlib.contextmanager
def running(*command: str, **env: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of this folder, ended with the block."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sys.stderr if "-v" in sys.argv else subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def self_with(place: Sequence[str], *words: str) -> list[str]:
    return [*place, sys.executable, "-m", "benchmarks.first_image", *words]


def measure(folder: Path, shape: Shape) -> dict[str, float]:
    """Seconds after exec of what happened, and `fetched` bytes."""
    with LinkEmulator(shape) as link, tempfile.TemporaryDirectory() as store:
        host = link.SERVER_ADDRESS
        settings = {
            "FANLIGHT_DIFFUSION_GRPC": GRPC,
            "FANLIGHT_DIFFUSION_FETCH": "any",
            "FANLIGHT_DIFFUSION_DEFAULT_MODEL": f"hf:{REPO}",
            "FANLIGHT_WEIGHTS_DIR": store,
            "FANLIGHT_WEIGHTS_HF_ENDPOINT": f"http://{host}:{PORT}",
        }
        with (
            running(*self_with(link.server, "--serve", str(folder), "--host", host)) as server,
            running(*self_with(link.client, "--ask")) as asker,
        ):
            assert server.stdout
            assert asker.stdout
            assert asker.stdin
            server.stdout.readline()
            asker.stdout.readline()
            link.restart_count()
            begin_s = time.perf_counter()
            with running(*link.client, sys.executable, "-m", "services.diffusion", **settings):
                asker.stdin.write("\n")
                asker.stdin.flush()
                reported = json.loads(asker.stdout.readline())
    at = {name: when - begin_s for name, when in reported["at"].items()}
    print(", ".join(f"{name} {took_s:.2f} s" for name, took_s in reported["spans"].items()), flush=True)
    return {**at, "first byte": link.first_s - begin_s, "fetched": reported["fetched"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--mbps", type=float, default=100)
    parser.add_argument("--rtt-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the repository, used again where it has it")
    parser.add_argument("-v", action="store_true", help="show what the processes say")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1", help=argparse.SUPPRESS)
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.serve:
        serve(asked.serve, asked.host)
    elif asked.ask:
        ask()
    elif reason := why_not():
        sys.exit(f"skipped: the link emulator {reason}")
    else:
        report = Report()
        mbps, rounds = (SMOKE_MBPS, 1) if asked.smoke else (asked.mbps, asked.rounds)
        size: Size = "tiny" if asked.smoke else "full" if asked.full else "small"
        with tempfile.TemporaryDirectory() as name:
            folder = (asked.keep or Path(name)) / "repository"
            if not folder.exists():
                make(folder, size=size)
            shape = Shape(mbps=mbps, delay_s=asked.rtt_ms / 2000, loss=0.0)
            add(report, [measure(folder, shape) for _ in range(rounds)], mbps)
        report.save(asked.json)
    return 0


def add(report: Report, runs: Sequence[dict[str, float]], mbps: float) -> None:
    fetched = runs[0]["fetched"]
    link_s = fetched * 8 / (mbps * 1e6)
    what = f"{fetched / 1e6:,.0f} MB of weights"
    report.add(what, link_s, "s", column="the link at its rate")
    for name in ("first byte", "port", "bytes"):
        report.add(what, [run[name] for run in runs], "s", column="last byte" if name == "bytes" else name)
    goal = GOAL_TIMES * link_s + GOAL_MORE_S
    report.add(what, [run["image"] for run in runs], "s", column="first image", goal=goal)


if __name__ == "__main__":
    sys.exit(main())
