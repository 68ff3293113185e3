"""Downloads whose process is killed with -9, in processes of their own."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONNECTIONS = 4
KILLS = 6
MIB = 1024 * 1024


@pytest.fixture
def body() -> bytes:
    return random.Random(3).randbytes(48 * MIB)


def _start(url: str, folder: Path, sha256: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FANLIGHT_")}
    env |= {"FANLIGHT_WEIGHTS_CONNECTIONS": str(CONNECTIONS), "PYTHONPATH": str(ROOT)}
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
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for_bytes(server, count: int, process: subprocess.Popen[str]) -> None:
    """Until the server has sent so many bytes in all; the wait is bounded."""
    arrived = threading.Event()
    for _ in range(2400):
        if server.total_sent() >= count or process.poll() is not None:
            return
        arrived.wait(0.05)
    raise AssertionError("the download makes no progress")


def test_a_download_killed_again_and_again_ends_right_and_wastes_little(server, body, tmp_path):
    url, sha256 = server.put("/m.safetensors.bin", body), hashlib.sha256(body).hexdigest()
    server.bytes_per_s = 4 * MIB  # for each connection
    chance = random.Random(11)
    for number in range(KILLS):
        process = _start(url, tmp_path, sha256)
        _wait_for_bytes(server, int(len(body) * (number + chance.random()) / (KILLS + 1)) + 1, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    before_last = server.total_sent()
    assert before_last < len(body), "the kills came too late to test anything"
    process = _start(url, tmp_path, sha256)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert Path(result["path"]).read_bytes() == body
    assert result["bytes"] == len(body)
    assert 0 < result["downloaded_bytes"] < len(body)
    assert server.total_sent() - len(body) <= KILLS * CONNECTIONS * MIB


def test_two_processes_share_one_download_and_the_second_goes_on_when_the_first_is_killed(server, body, tmp_path):
    url, sha256 = server.put("/m.bin", body), hashlib.sha256(body).hexdigest()
    server.bytes_per_s = 4 * MIB
    first = _start(url, tmp_path, sha256)
    _wait_for_bytes(server, len(body) // 4, first)
    second = _start(url, tmp_path, sha256)
    _wait_for_bytes(server, len(body) // 2, first)
    first.kill()
    first.communicate(timeout=30)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    assert Path(json.loads(out.splitlines()[-1])["path"]).read_bytes() == body
    assert server.total_sent() - len(body) <= CONNECTIONS * MIB
