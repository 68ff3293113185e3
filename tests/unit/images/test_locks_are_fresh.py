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


@pytest.mark.parametrize("name", ["torch-cuda", "torch-cuda126"])
def test_a_torch_with_cuda_has_what_the_cpus_has_and_one_generation_of_cuda(name):
    own, cpu = (
        dict(line.replace("===", "==").split("==") for line in text.splitlines() if not line.startswith("#"))
        for text in ((DOCKER / "locks" / f"{each}.txt").read_text() for each in (name, "torch"))
    )
    assert own["torch"].partition("+")[0] == cpu.pop("torch")
    assert cpu.items() <= own.items()
    assert {each[-4:] for each in own if each.endswith(("-cu12", "-cu13"))} == {"cu12" if "126" in name else "cu13"}


def test_an_image_is_built_with_the_list_that_its_name_says(monkeypatch):
    monkeypatch.syspath_prepend(DOCKER)
    spec = importlib.util.spec_from_file_location("docker_build", DOCKER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    variants = {name: build._variant(name) for name in ("diffusion", "diffusion-cuda", "preprocessor-neural-cuda126")}
    assert variants == {
        "diffusion": {},
        "diffusion-cuda": {"TORCH": "torch-cuda"},
        "preprocessor-neural-cuda126": {"TORCH": "torch-cuda126"},
    }
    with pytest.raises(SystemExit, match="gateway-cuda126 is no image of ours"):
        build.build("gateway-cuda126", {})


def test_wheels_of_an_old_cuda_lie_apart_and_are_fetched_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(DOCKER)
    spec = importlib.util.spec_from_file_location("docker_build", DOCKER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    (tmp_path / "fanlight-0.1.0-cp311-cp311-linux_x86_64.whl").touch()
    monkeypatch.setattr(build, "WHEELS", tmp_path)
    fetched, runs = {}, []
    monkeypatch.setattr(
        build, "_download", lambda *what, into=tmp_path: fetched.setdefault(into.name, set()).update(what)
    )
    monkeypatch.setattr(build, "_run", lambda *command: runs.append(command))

    build.make_wheels(cuda="torch-cuda126")

    assert "torch===2.13.0+cu126" in fetched["torch-cuda126"]
    assert "torch==2.13.0" in fetched[tmp_path.name]
    assert not any("cu12" in each or "cu13" in each for each in fetched[tmp_path.name])


def test_the_gateway_gets_no_numpy_no_opencv_and_no_torch(lock):
    found = lock.locks()
    names = {line.partition("==")[0] for layer in ("common", "gateway") for line in found[layer].splitlines()}
    assert not names & {"numpy", "torch", "opencv-python-headless", "pillow"}


def test_the_core_preprocessor_gets_no_torch(lock):
    found = lock.locks()
    names = {line.partition("==")[0] for layer in ("common", "worker", "opencv") for line in found[layer].splitlines()}
    assert not names & {"torch", "transformers", "diffusers"}
