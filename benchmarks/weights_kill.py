"""One big download, killed with -9 at random moments: is the result right, and how much came twice?

Bytes are counted at the server. Run: `python -m benchmarks.weights_kill [--bytes 1000000000] [--kills 50]`.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Report, arguments
from benchmarks.noise import noise
from services.weights.references.tensors import sha256_of
from tests.fakes.range_server import RangeServer

MIB = 1024 * 1024
CONNECTIONS = 8
SMOKE_BYTES = 8_000_000


def _start(url: str, sha256: str, folder: Path) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "services.weights",
        "fetch",
        url,
        "--sha256",
        sha256,
        "--json",
        "--dir",
        str(folder),
    ]
    env = {**os.environ, "FANLIGHT_WEIGHTS_CONNECTIONS": str(CONNECTIONS)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def _wait_for(server: RangeServer, count: int, process: "subprocess.Popen[str]") -> None:
    while server.total_sent() < count and process.poll() is None:
        time.sleep(0.005)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--kills", type=int, default=50)
    asked = parser.parse_args(argv)
    size, kills = (SMOKE_BYTES, 1) if asked.smoke else (asked.bytes, asked.kills)
    report, chance = Report(), random.Random(2)
    with RangeServer() as server, tempfile.TemporaryDirectory() as name:
        body = Path(name) / "body"
        sha256 = noise(body, size)
        url = server.put("/m.bin", body)
        server.bytes_per_s = 12 * MIB
        for number in range(kills):
            process = _start(url, sha256, Path(name) / "store")
            share = (number + chance.random()) / (kills + 1)
            _wait_for(server, int(size * share) + 1, process)
            process.kill()
            process.communicate()
        process = _start(url, sha256, Path(name) / "store")
        out, _ = process.communicate()
        path = Path(json.loads(out.splitlines()[-1])["path"])
        wasted = server.total_sent() - size
        per_kill = wasted / kills / CONNECTIONS / MIB
        assert sha256_of(path) == sha256, "the download is not what was served"
    what = f"{kills} kills of a download of {size / 1e6:,.0f} MB over {CONNECTIONS} connections"
    report.add(f"{what}, sent twice", wasted / 1e6, "MB")
    report.add(f"{what}, sent twice for each connection and kill", per_kill, "MiB", goal=1.0)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
