"""One file over a home link that loses packets and breaks: ours against curl with resume, huggingface_hub and aria2.

The link is benchmarks.link_emulator: the machine's real TCP over one rate, a delay and a loss of packets; the server
resets every connection every few seconds. Bytes beyond the file are what reached the client more than once, and
headers. Each client's time runs from its first byte to its end. Needs root; what is not installed is skipped.
On a machine that is busy with other things, give all of it their time: `chrt -f 5 python -m benchmarks.weights_link`.
Run: `python -m benchmarks.weights_link [--bytes 250000000] [--mbps 100] [--rtt-ms 20] [--loss 0.005] [--cut-s 5]`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import RATIO, Report, arguments
from benchmarks.link_emulator import LinkEmulator, Shape, why_not
from benchmarks.link_server import PATH
from benchmarks.noise import noise

PORT = 8080
PROXY_PORT = 3128
# The least share of the link's rate.
GOALS = {"ours": 0.93, "proxied": 0.9}
# A client that takes so many times what the link would is not waited for.
PATIENCE = 3
SMOKE_BYTES = 2_000_000
REPO, FILE = "org/m", "model.bin"
HUB = "from huggingface_hub import hf_hub_download as d; print(d({repo!r}, {file!r}, cache_dir={folder!r}))"


class GaveUp(Exception):
    """It was never whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    link: LinkEmulator
    url: str
    sha256: str
    folder: Path
    # On time.perf_counter.
    give_up_s: float

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """The command at the client's end of the link."""
        return subprocess.run(
            [*self.link.client, *command], env={**os.environ, **env}, capture_output=True, text=True, check=False
        )

    def until_it_works(self, *command: str, **env: str) -> str:
        while True:
            done = self.run(*command, **env)
            if not done.returncode:
                return done.stdout
            if time.perf_counter() > self.give_up_s:
                raise GaveUp


def ours(job: Job, **env: str) -> Path:
    command = [sys.executable, "-m", "services.weights", "fetch", job.url, "--sha256", job.sha256]
    done = job.run(*command, "--dir", str(job.folder), FANLIGHT_WEIGHTS_RETRIES="100", **env)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return Path(done.stdout.splitlines()[-1])


def proxied(job: Job) -> Path:
    """Through a proxy at the client's end."""
    command = [*job.link.client, sys.executable, "-m", "benchmarks.link_proxy", "--port", str(PROXY_PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout
        proxy.stdout.readline()
        try:
            return ours(job, http_proxy=f"http://127.0.0.1:{PROXY_PORT}", no_proxy="")
        finally:
            proxy.kill()


def curl(job: Job) -> Path:
    job.until_it_works("curl", "-sfL", "-C", "-", "-o", str(job.folder / FILE), job.url)
    return job.folder / FILE


def aria2(job: Job) -> Path:
    options = ["-q", "-c", "-x8", "-s8", "-k1M", "--max-tries=0", "--retry-wait=0", "--file-allocation=falloc"]
    digest = f"--checksum=sha-256={job.sha256}"
    job.until_it_works("aria2c", *options, digest, "-d", str(job.folder), "-o", FILE, job.url)
    return job.folder / FILE


def hub(job: Job) -> Path:
    code = HUB.format(repo=REPO, file=FILE, folder=str(job.folder))
    endpoint = job.url.removesuffix(PATH)
    out = job.until_it_works(sys.executable, "-c", code, HF_ENDPOINT=endpoint, HF_HUB_DISABLE_TELEMETRY="1")
    return Path(out.splitlines()[-1])


CLIENTS: dict[str, tuple[str, Callable[[Job], Path], str]] = {
    "ours": ("Fanlight", ours, ""),
    "proxied": ("Fanlight through a proxy", proxied, ""),
    "curl": ("curl `-C -` until it is whole", curl, "curl"),
    "aria2": ("aria2 `-x8 -s8`, checked", aria2, "aria2c"),
    "hub": ("huggingface_hub until it is whole", hub, ""),
}


@contextmanager
def serving(link: LinkEmulator, body: Path, sha256: str, cut_s: float) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.link_server", str(body), sha256, "--address", link.SERVER_ADDRESS]
    more = ["--port", str(PORT), "--cut-s", str(cut_s)]
    with subprocess.Popen([*link.server, *command, *more], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        server.stdout.readline()
        try:
            yield f"http://{link.SERVER_ADDRESS}:{PORT}{PATH}"
        finally:
            server.kill()


def measure(client: str, shape: Shape, body: Path, sha256: str, cut_s: float, report: Report) -> None:
    title, fetch, program = CLIENTS[client]
    if program and not shutil.which(program):
        print(f"{title}: skipped, {program} is not installed", flush=True)
        return
    size = body.stat().st_size
    sent = f"{size / 1e6:,.1f} MB"
    rate = shape.mbps * 1e6 / 8
    with (
        LinkEmulator(shape) as link,
        tempfile.TemporaryDirectory() as name,
        serving(link, body, sha256, cut_s) as url,
    ):
        give_up_s = time.perf_counter() + PATIENCE * size / rate
        try:
            path = fetch(Job(link=link, url=url, sha256=sha256, folder=Path(name), give_up_s=give_up_s))
        except GaveUp:
            report.add(f"{title}, never whole", link.passed_bytes / 1e6, "MB", column=f"came in vain, {sent}")
            return
        took_s = time.perf_counter() - link.first_s
        with path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
        beyond = link.passed_bytes - size
        share, column = size / took_s / rate, f"share of the link's rate, {sent}"
        report.add(title, share, RATIO, column=column, goal=GOALS.get(client), at_least=True)
        report.add(title, beyond / 1e6, "MB", column=f"beyond the file, {sent}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--bytes", type=int, default=250_000_000)
    parser.add_argument("--mbps", type=float, default=100)
    parser.add_argument("--rtt-ms", type=float, default=20)
    parser.add_argument("--loss", type=float, default=0.005)
    parser.add_argument("--cut-s", type=float, default=5)
    parser.add_argument("--clients", default=",".join(CLIENTS))
    asked = parser.parse_args(argv)
    if reason := why_not():
        sys.exit(f"skipped: the link emulator {reason}")
    report, shape = Report(), Shape(mbps=asked.mbps, delay_s=asked.rtt_ms / 2000, loss=asked.loss)
    size, clients = (SMOKE_BYTES, "ours,curl") if asked.smoke else (asked.bytes, asked.clients)
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "body"
        sha256 = noise(body, size)
        for client in clients.split(","):
            measure(client, shape, body, sha256, asked.cut_s, report)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
