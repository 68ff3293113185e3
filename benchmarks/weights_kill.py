"""One big download, killed with -9 at random moments: is the result right, and how much came twice?

Bytes are counted at the server. Run: `python -m benchmarks.weights_kill [--bytes 1000000000] [--kills 50]`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.noise import noise
from services.weights.files import sha256_of
from tests.fakes.range_server import RangeServer

MIB = 1024 * 1024
CONNECTIONS = 8


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--kills", type=int, default=50)
    arguments = parser.parse_args()
    chance = random.Random(2)
    with RangeServer() as server, tempfile.TemporaryDirectory() as name:
        body = Path(name) / "body"
        sha256 = noise(body, arguments.bytes)
        url = server.put("/m.bin", body)
        server.bytes_per_s = 12 * MIB
        for number in range(arguments.kills):
            process = _start(url, sha256, Path(name) / "store")
            share = (number + chance.random()) / (arguments.kills + 1)
            _wait_for(server, int(arguments.bytes * share) + 1, process)
            process.kill()
            process.communicate()
        process = _start(url, sha256, Path(name) / "store")
        out, _ = process.communicate()
        path = Path(json.loads(out.splitlines()[-1])["path"])
        wasted = server.total_sent() - arguments.bytes
        per_kill = wasted / arguments.kills / CONNECTIONS / MIB
        print(f"{arguments.kills} kills of a download of {arguments.bytes:,} bytes over {CONNECTIONS} connections")
        print(f"result right: {sha256_of(path) == sha256}")
        print(f"sent twice: {wasted:,} bytes, {per_kill:.3f} MiB per connection and kill (at most 1)")


if __name__ == "__main__":
    main()
