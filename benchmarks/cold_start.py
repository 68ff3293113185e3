"""From nothing on a node to its first image, over a link: our diffusion image beside a plain `pip install` of it.

usage: python -m benchmarks.cold_start [--mbps 100] [--delay-ms 20] [--rounds 3]     as root; needs podman and skopeo

Both images lie in an OCI layout, ours with zstd layers, the plain one with gzip's, as builders make them. A registry
serves it at the far end of an emulated link; at this end podman pulls into an empty store, runs the container, and the
first image is generated with the starter model. `make images` builds ours, and this the plain one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.figures import Report, arguments
from benchmarks.link_emulator import LinkEmulator, Shape, why_not
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc

ROOT = Path(__file__).parent.parent
LAYOUT = ROOT / "dist" / "cold-start"
PLAIN = "localhost/fanlight-bench/plain:latest"
# What each side is called in the layout.
IMAGES = {"ours": "diffusion-starter", "plain": "plain"}
REGISTRY_PORT = 5000
GRPC = "127.0.0.1:50053"
PATIENCE_S = 900.0
POLL_S = 0.05
SMOKE_MBPS = 10_000.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--mbps", type=float, default=100.0)
    parser.add_argument("--delay-ms", type=float, default=20.0, help="one way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--generate", metavar="HOST:PORT", help="only generate there as soon as it can be done")
    asked = parser.parse_args(argv)
    if asked.generate:
        generate(asked.generate)
        return 0
    if reason := why_not() or ("" if shutil.which("podman") and shutil.which("skopeo") else "needs podman and skopeo"):
        print(f"cold_start cannot run here: {reason}", file=sys.stderr)
        return 2
    prepare()
    report = Report()
    # A smoke run's link is no bound: what it shows is that both images come and generate.
    mbps, rounds = (SMOKE_MBPS, 1) if asked.smoke else (asked.mbps, asked.rounds)
    shape = Shape(mbps=mbps, delay_s=asked.delay_ms / 1e3, loss=0.0)
    taken: dict[str, list[Start]] = {name: [] for name in IMAGES}
    for number in range(rounds):
        for name in IMAGES if number % 2 == 0 else reversed(IMAGES):
            taken[name].append(measure(name, shape))
    against = "one `pip install` of the same service, on the same base and torch"
    ours, plain = taken["ours"], taken["plain"]
    whole = [each.pull_s + each.start_s for each in ours], [each.pull_s + each.start_s for each in plain]
    report.ratio("from an empty store to the first image", *whole, against=against, goal=0.5)
    report.ratio("the pull", [each.pull_s for each in ours], [each.pull_s for each in plain], against=against)
    report.ratio("bytes", [each.moved_mb for each in ours], [each.moved_mb for each in plain], against=against)
    for name, title in (("ours", "ours"), ("plain", "one `pip install`")):
        report.add(f"{title}, fetched", [each.moved_mb for each in taken[name]], "MB")
        report.add(f"{title}, pull", [each.pull_s for each in taken[name]], "s")
        report.add(f"{title}, then to the first image", [each.start_s for each in taken[name]], "s")
    report.save(asked.json)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How long the pull took, how long from there to the first image, and what came over the link."""

    pull_s: float
    start_s: float
    moved_mb: float


def prepare() -> None:
    """Both images in one layout, unless they are there."""
    if not (LAYOUT / "index.json").exists():
        subprocess.run([sys.executable, "docker/build.py", "wheels-plain"], cwd=ROOT, check=True)
        # Not from podman's cache, which does not see that the wheels that are mounted are others now.
        build = [
            "podman",
            "build",
            "--quiet",
            "--no-cache",
            "--network",
            "none",
            "--file",
            "benchmarks/plain.Dockerfile",
        ]
        subprocess.run([*build, "--tag", PLAIN, "."], cwd=ROOT, check=True)
        LAYOUT.mkdir(parents=True)
        subprocess.run(
            [sys.executable, "docker/build.py", "diffusion:starter", "--export", LAYOUT], cwd=ROOT, check=True
        )
        how = ["--quiet", "--dest-compress-format", "gzip"]
        subprocess.run(["skopeo", "copy", *how, f"containers-storage:{PLAIN}", f"oci:{LAYOUT}:plain"], check=True)


def measure(name: str, shape: Shape) -> Start:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as store, LinkEmulator(shape) as link:
        host = f"{link.SERVER_ADDRESS}:{REGISTRY_PORT}"
        serving = [*link.server, sys.executable, "-m", "benchmarks.layout_registry", str(LAYOUT), host]
        generating = [*link.client, sys.executable, "-m", "benchmarks.cold_start", "--generate", GRPC]
        podman = ["podman", "--root", f"{store}/root", "--runroot", f"{store}/run"]
        # The last word of the client's prefix is the name of its network namespace.
        network = f"ns:/run/netns/{link.client[-1]}"
        with started(serving), started(generating) as generator:
            time.sleep(2)  # Both have imported what they need, and wait.
            begin_s = time.perf_counter()
            image = f"{host}/{IMAGES[name]}:latest"
            subprocess.run(
                [*link.client, *podman, "pull", "--quiet", "--tls-verify=false", image], check=True, capture_output=True
            )
            pulled_s = time.perf_counter()
            locked = ["--read-only", "--tmpfs", "/tmp", "--network", network, "--env", "HOME=/tmp"]
            local = ["--env", f"FANLIGHT_DIFFUSION_GRPC={GRPC}"]
            subprocess.run([*podman, "run", "--detach", *locked, *local, image], check=True, capture_output=True)
            try:
                if generator.wait(timeout=PATIENCE_S):
                    raise SystemExit("error: no image was generated")
                end_s = time.perf_counter()
            finally:
                subprocess.run([*podman, "rm", "--all", "--force", "--time", "0"], check=False, capture_output=True)
                subprocess.run([*podman, "rmi", "--all", "--force"], check=False, capture_output=True)
        moved = link.passed_bytes / 1e6
    return Start(pull_s=pulled_s - begin_s, start_s=end_s - pulled_s, moved_mb=moved)


class started:  # noqa: N801
    """A process, ended with the block."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def generate(address: str) -> None:
    """Asks again and again until an image came."""
    request = diffusion_pb2.GenerateRequest(prompt="a red apple on a blue background", seed=1)
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
                stub = diffusion_pb2_grpc.DiffusionServiceStub(channel)
                if any(answer.WhichOneof("event") == "image" for answer in stub.Generate(request)):
                    return
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        time.sleep(POLL_S)
    raise SystemExit("error: no worker generated an image")


if __name__ == "__main__":
    sys.exit(main())
