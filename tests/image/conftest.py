"""Real containers of the images that `make images` built; skipped, with the reason, where there are none."""

import functools
import json
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREFIX = "localhost/fanlight"
# What a container is let, and no more.
LOCKED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
# Beyond loopback no gateway starts without it. A worker here has no gateway, so it needs direct calls.
GATEWAY_TOKENS = ("--env", "FANLIGHT_CLIENT_TOKEN=operator-0123456789")
WORKER_TOKENS = ("--env", "FANLIGHT_WORKER_DIRECT_TOKEN=direct")
# Much longer than it takes: what is broken is told, not waited for.
PATIENCE_S = 240
# podman's exit code where the container's runtime itself fails.
CANNOT_START = 126


def podman(*arguments, check=True):
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
    assert not check or done.returncode == 0, done.stderr
    return done


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def require_image():
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")

    def require(name):
        if podman("image", "exists", f"{PREFIX}/{name}", check=False).returncode:
            pytest.skip(f"{PREFIX}/{name} is not there: `make images` builds it")
        _skip_unless_containers_start(f"{PREFIX}/{name}")
        return f"{PREFIX}/{name}"

    return require


@functools.cache
def _refusal(image):
    """Why this machine starts no container at all; empty where it does."""
    tried = podman("run", "--rm", "--entrypoint", "python3", image, "-c", "", check=False)
    return tried.stderr.strip() if tried.returncode == CANNOT_START else ""


def _skip_unless_containers_start(image):
    if refusal := _refusal(image):
        pytest.skip(f"podman starts no container here: {refusal[-160:]}")


class Container:
    def __init__(self, image, *options, command=()):
        tokens = GATEWAY_TOKENS if image.endswith("/gateway") else WORKER_TOKENS
        self.id = podman("run", "--detach", *LOCKED, *tokens, *options, image, *command).stdout.strip()

    def exec(self, *command, check=True):
        return podman("exec", self.id, *command, check=check)

    def wait_until_healthy(self):
        """Asks as a probe would."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            if self.exec("python3", "-m", "fanlight.health", check=False).returncode == 0:
                return
            assert self.inspect()["State"]["Running"], self.logs()
            time.sleep(0.2)
        raise AssertionError(f"not healthy: {self.logs()}")

    def catches(self, number):
        """Whether the first process has a handler for the signal."""
        status = self.exec("cat", "/proc/1/status", check=False).stdout
        caught = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")]
        return bool(caught and caught[0] >> (number - 1) & 1)

    def inspect(self):
        return json.loads(podman("inspect", self.id).stdout)[0]

    def logs(self):
        done = podman("logs", self.id)
        return done.stdout + done.stderr

    def stop(self):
        """The exit code; 137 where SIGTERM was not enough."""
        podman("stop", "--time", "60", self.id)
        return self.inspect()["State"]["ExitCode"]


@pytest.fixture
def run(require_image):
    started, volumes = [], []

    def start(name, *options, volume="", command=()):
        image = require_image(name)
        if volume:
            volumes.append(f"fanlight-test-{uuid.uuid4().hex}")
            options = (*options, "--volume", f"{volumes[-1]}:{volume}")
        started.append(Container(image, *options, command=command))
        return started[-1]

    yield start
    for container in started:
        podman("rm", "--force", "--time", "0", container.id, check=False)
    for name in volumes:
        podman("volume", "rm", "--force", name, check=False)
