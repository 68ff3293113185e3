import json
import os
import re
import shutil
import signal
import subprocess
import sys

import grpc
import pytest

from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from tests.image.conftest import PATIENCE_S, ROOT, podman

IMAGES = ("gateway", "preprocessor", "preprocessor-neural", "diffusion")
VOLUMES = {"gateway": "/data"}
# Python says where it takes each module from; the image's own entry point is the rest.
VERBOSE = ("--entrypoint", json.dumps(["python3", "-v", "-P", "/opt/fanlight/entry.py"]))
COMPILED_NOW = re.compile(r"^# code object from '(.*\.py)'", re.MULTILINE)
LISTENERS = "import re; print(re.findall(r': 0{32}:([0-9A-F]{4}) ', open('/proc/net/tcp6').read()))"

# The gateway makes its certificate itself.
OWN_ROOTS = ("--ca-file", "/data/tls/authority.pem")


@pytest.mark.parametrize("name", IMAGES)
def test_a_container_serves_as_nobody_on_a_read_only_root_and_ends_on_sigterm(run, name):
    container = run(name, volume=VOLUMES.get(name, "/weights"))
    container.wait_until_healthy()
    assert container.exec("id", "-u").stdout.strip() == "65532"
    assert container.exec("touch", "/opt/fanlight/x", check=False).returncode != 0
    assert container.exec("cat", "/proc/1/cmdline").stdout.split("\0")[-2] == name.removesuffix("-neural")
    assert container.stop() == 0


@pytest.mark.parametrize("name", IMAGES)
def test_a_container_that_is_stopped_while_it_starts_needs_no_kill(run, name):
    container = run(name, volume=VOLUMES.get(name, "/weights"))
    # Before Python itself runs, the kernel keeps every signal from a first process.
    while not container.catches(signal.SIGTERM):
        assert container.inspect()["State"]["Running"], container.logs()
    assert container.stop() in (0, 143), container.logs()


@pytest.mark.parametrize("name", ["gateway", "preprocessor", "preprocessor-neural"])
def test_nothing_is_compiled_when_a_container_starts(run, name):
    container = run(name, *VERBOSE, volume=VOLUMES.get(name, "/weights"), command=[name.removesuffix("-neural")])
    container.wait_until_healthy()
    assert COMPILED_NOW.findall(container.logs()) == []


def test_a_first_image_is_generated_and_nothing_is_compiled_for_it(run):
    options = (*VERBOSE, "--publish", "127.0.0.1::50053")
    container = run("diffusion:starter", *options, volume="/weights", command=["diffusion"])
    container.wait_until_healthy()
    address = podman("port", container.id, "50053/tcp").stdout.strip()
    request = diffusion_pb2.GenerateRequest(prompt="a red apple", seed=1, steps=2)
    bearer = (("authorization", "bearer direct"),)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        answers = diffusion_pb2_grpc.DiffusionServiceStub(channel).Generate(
            request, metadata=bearer, timeout=PATIENCE_S
        )
        assert any(answer.WhichOneof("event") == "image" for answer in answers)
    assert COMPILED_NOW.findall(container.logs()) == []


def test_services_listen_on_ipv6_and_ipv4(run):
    container = run("gateway", volume="/data")
    container.wait_until_healthy()
    ports = container.exec("python3", "-c", LISTENERS).stdout
    assert f"{50051:04X}" in ports
    assert f"{8080:04X}" in ports
    assert container.exec("python3", "-m", "fanlight.health", "127.0.0.1:50051", *OWN_ROOTS).returncode == 0


def test_a_service_without_tokens_refuses_to_start_and_says_why(require_image):
    done = subprocess.run(["podman", "run", "--rm", require_image("gateway")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "FANLIGHT_CLIENT_TOKEN" in done.stderr


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_has_labels_and_no_installer(require_image, name):
    image = require_image(name)
    shown = subprocess.run(["podman", "inspect", image], capture_output=True, text=True, check=True).stdout
    assert '"org.opencontainers.image.licenses": "Apache-2.0"' in shown
    find = "import importlib.util, shutil; print([n for n in ('pip', 'setuptools') if importlib.util.find_spec(n)]"
    find += ", [n for n in ('gcc', 'cc', 'ld', 'git', 'apt-get') if shutil.which(n)])"
    command = ["podman", "run", "--rm", "--entrypoint", "python3", image, "-c", find]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_baked_weights_are_a_layer_each(require_image):
    plan = [sys.executable, "-m", "fanlight.cli.main", "weights", "plan", "starter-all", "--json"]
    files = json.loads(subprocess.run(plan, cwd=ROOT, capture_output=True, check=True).stdout)["files"]
    plain, baked = (
        json.loads(podman("inspect", require_image(name)).stdout)[0]["RootFS"]["Layers"]
        for name in ("diffusion", "diffusion:starter")
    )
    assert baked[: len(plain)] == plain
    assert len(baked) - len(plain) == len(files)


def test_the_images_are_within_their_budgets():
    layout = ROOT / "dist" / "images" / "index.json"
    if not layout.exists():
        pytest.skip("dist/images is not there: `make images` writes it")
    names = [name for name in ("base", *IMAGES) if f'"{name}"' in layout.read_text()]
    command = [sys.executable, ROOT / "docker" / "size_audit.py", *(f"oci:{layout.parent}:{name}" for name in names)]
    done = subprocess.run([*command, "--budget", ROOT / "docker" / "budget.toml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(1200)
def test_the_main_job_runs_through_the_containers_and_outlives_a_killed_worker(require_image, tmp_path):
    for name in ("gateway", "preprocessor", "diffusion:starter"):
        require_image(name)
    if shutil.which("podman-compose") is None:
        pytest.skip("podman-compose is not installed")
    environ = {**os.environ, "FANLIGHT_HTTP_PORT": "18180", "FANLIGHT_GRPC_PORT": "18151"}
    command = [ROOT / "docker" / "demo.sh", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=4 * PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((tmp_path / f"image-{number}.png").read_bytes().startswith(b"\x89PNG") for number in (1, 2))
