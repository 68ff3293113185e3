import importlib
import json
import re
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCKER = Path(__file__).parents[3] / "docker"


@pytest.fixture
def lock(monkeypatch):
    monkeypatch.syspath_prepend(DOCKER)
    return importlib.import_module("lock")


@pytest.fixture
def build(lock):
    return importlib.import_module("build")


def test_the_locks_are_what_pyproject_and_the_constraints_say(lock):
    made = lock.locks()
    assert {"common", "gateway", "worker", "opencv", "torch", "transformers", "diffusion"} <= made.keys()
    assert lock.check() == [], "run `python docker/lock.py`"


def test_a_package_without_a_hash_and_a_stale_lock_are_told(lock, monkeypatch, tmp_path):
    shutil.copytree(lock.LOCKS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    assert lock.check() == []
    for name, change in (
        ("opencv", lambda line: line.partition(" ")[0]),
        ("torch", lambda line: line.replace("=3", "=4")),
    ):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(f"{change(line)}\n" for line in path.read_text().splitlines()))
    assert [fault.partition(";")[0] for fault in lock.check()] == [
        "docker/locks/torch.txt is not what layers.toml and constraints.txt say",
        "docker/locks has no hash for kornia-rs==0.2.0",
        "docker/locks has no hash for opencv-python-headless==5.0.0.93",
    ]


def test_a_new_package_gets_its_hash_and_the_others_keep_theirs(lock, monkeypatch, tmp_path):
    shutil.copytree(lock.LOCKS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(lock, "LOCKS", tmp_path)
    monkeypatch.setattr(lock, "LICENSES", tmp_path / "licenses.json")
    path = tmp_path / "torch-cuda126.txt"
    before = path.read_text()
    asked = []
    wheel = lock.lock_index.Wheel(sha256="a" * 64, license="MIT")
    monkeypatch.setattr(lock.lock_index, "ask", lambda pins, folders: asked.extend(pins) or {"torch": wheel})

    assert lock.write([]) == []

    assert asked == ["torch===2.13.0+cu126"]
    assert path.read_text() == before.replace("2.13.0+cu126", f"2.13.0+cu126 --hash=sha256:{'a' * 64}")
    assert json.loads((tmp_path / "licenses.json").read_text())["torch===2.13.0+cu126"] == "MIT"


def test_the_line_of_a_lock_that_is_no_pin_is_refused(lock, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("# a comment\na==1 --hash=sha256:" + "0" * 64 + "\n-r other.txt\n")
    with pytest.raises(ValueError, match=r"not a pin: -r other\.txt"):
        lock.read(path)


def test_no_image_gets_a_package_from_two_layers(lock):
    layers = tomllib.loads((DOCKER / "layers.toml").read_text())["layers"]
    packages = {name: set((DOCKER / "locks" / f"{name}.txt").read_text().splitlines()[1:]) for name in layers}
    for name, layer in layers.items():
        for below in layer.get("below", ()):
            assert not packages[name] & packages[below], (name, below)


@pytest.mark.parametrize("name", ["torch-cuda", "torch-cuda126"])
def test_a_torch_with_cuda_has_what_the_cpus_has_and_one_generation_of_cuda(lock, name):
    own, cpu = (
        {pin.name: pin.version for pin in lock.read(DOCKER / "locks" / f"{each}.txt")} for each in (name, "torch")
    )
    assert own["torch"].partition("+")[0] == cpu.pop("torch")
    assert cpu.items() <= own.items()
    assert {each[-4:] for each in own if each.endswith(("-cu12", "-cu13"))} == {"cu12" if "126" in name else "cu13"}


def test_an_image_is_built_with_the_list_that_its_name_says(build):
    variants = {name: build._variant(name) for name in ("diffusion", "diffusion-cuda", "preprocessor-neural-cuda126")}
    assert variants == {
        "diffusion": {},
        "diffusion-cuda": {"TORCH": "torch-cuda"},
        "preprocessor-neural-cuda126": {"TORCH": "torch-cuda126"},
    }
    with pytest.raises(SystemExit, match="gateway-cuda126 is no image of ours"):
        build.build("gateway-cuda126", {})


@pytest.fixture
def fetched(build, monkeypatch, tmp_path):
    """Lines that were downloaded, by the name of the folder."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "fanlight-0.1.0-cp311-cp311-linux_x86_64.whl").touch()
    monkeypatch.setattr(build, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(build, "_run", lambda *command: None)
    found = {}

    def note(*what, into=None):
        found.setdefault(into.name if into else "wheels", set()).update(what)

    monkeypatch.setattr(build, "_download", note)
    return found


def test_wheels_of_an_old_cuda_lie_apart_and_are_fetched_alone(build, fetched, monkeypatch, tmp_path):
    path = tmp_path / "torch-cuda126.txt"
    text = (DOCKER / "locks" / path.name).read_text()
    path.write_text(text.replace("2.13.0+cu126", f"2.13.0+cu126 --hash=sha256:{'a' * 64}"))
    monkeypatch.setattr(build, "LOCKS", [*(each for each in build.LOCKS if each.name != path.name), path])

    build.make_wheels(cuda="torch-cuda126")

    assert f"torch===2.13.0+cu126 --hash=sha256:{'a' * 64}" in fetched["torch-cuda126"]
    assert any(each.startswith("torch==2.13.0 --hash=sha256:") for each in fetched["wheels"])
    assert any(each.startswith("pip==") for each in fetched["wheels"])
    assert not any("cu12" in each or "cu13" in each for each in fetched["wheels"])
    assert all(" --hash=sha256:" in each for lines in fetched.values() for each in lines)


def test_a_wheel_whose_hash_nobody_said_is_not_fetched(build, fetched):
    with pytest.raises(SystemExit, match=r"torch-cuda126.txt has no sha256 for torch===2.13.0\+cu126"):
        build.make_wheels(cuda="torch-cuda126")


def test_a_base_image_is_named_by_its_digest(build, monkeypatch):
    digest = f"sha256:{'b' * 64}"
    assert build.by_digest(f"docker.io/library/python:3.11@{digest}") == f"docker.io/library/python:3.11@{digest}"
    with pytest.raises(SystemExit, match="may be another image tomorrow"):
        build.by_digest("docker.io/library/python:3.11-slim-bookworm")
    answer = SimpleNamespace(stdout=f"{digest}\n")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: answer)
    assert build.by_digest("localhost/fanlight/base:bookworm") == f"localhost/fanlight/base@{digest}"
    answer.stdout = ""
    with pytest.raises(SystemExit, match=r"run docker/base/make.sh"):
        build.by_digest("localhost/fanlight/base:bookworm")
    default = next(line for line in (DOCKER / "Dockerfile").read_text().splitlines() if "ARG BASE_IMAGE=" in line)
    assert re.search(r"@sha256:[0-9a-f]{64}$", default)


def test_the_gateway_gets_no_numpy_no_opencv_and_no_torch(lock):
    found = lock.locks()
    names = {pin.name for layer in ("common", "gateway") for pin in found[layer]}
    assert not names & {"numpy", "torch", "opencv-python-headless", "pillow"}


def test_the_core_preprocessor_gets_no_torch(lock):
    found = lock.locks()
    names = {pin.name for layer in ("common", "worker", "opencv") for pin in found[layer]}
    assert not names & {"torch", "transformers", "diffusers"}
