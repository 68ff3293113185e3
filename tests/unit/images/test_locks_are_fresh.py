import importlib.util
import tomllib
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[3] / "docker"


@pytest.fixture(scope="module")
def lock():
    spec = importlib.util.spec_from_file_location("docker_lock", DOCKER / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_locks_are_what_pyproject_and_the_constraints_say(lock):
    made = lock.locks()
    assert {"common", "gateway", "worker", "opencv", "torch", "transformers", "diffusion"} <= made.keys()
    written = {name: (DOCKER / "locks" / f"{name}.txt").read_text() for name in made}
    assert written == made, "run `python docker/lock.py`"


def test_no_image_gets_a_package_from_two_layers(lock):
    layers = tomllib.loads((DOCKER / "layers.toml").read_text())["layers"]
    packages = {name: set((DOCKER / "locks" / f"{name}.txt").read_text().splitlines()[1:]) for name in layers}
    for name, layer in layers.items():
        for below in layer.get("below", ()):
            assert not packages[name] & packages[below], (name, below)


def test_the_gateway_gets_no_numpy_no_opencv_and_no_torch(lock):
    found = lock.locks()
    names = {line.partition("==")[0] for layer in ("common", "gateway") for line in found[layer].splitlines()}
    assert not names & {"numpy", "torch", "opencv-python-headless", "pillow"}


def test_the_core_preprocessor_gets_no_torch(lock):
    found = lock.locks()
    names = {line.partition("==")[0] for layer in ("common", "worker", "opencv") for line in found[layer].splitlines()}
    assert not names & {"torch", "transformers", "diffusers"}
