"""What a service must not load, told by a fresh interpreter; and what its extra must not bring, told by metadata."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "cv2", "PIL", "diffusers", "transformers"}


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(out.stdout.split())


@pytest.mark.parametrize(
    ("statement", "banned"),
    [
        ("import services.gateway.__main__", HEAVY),
        ("import fanlight.cli.main, fanlight.client", HEAVY | {"fastapi", "pydantic", "structlog"}),
        ("import services.preprocessor.__main__", {"torch", "diffusers", "transformers", "scipy"}),
        ("import services.worker, services.kernel.grpc_server", HEAVY),
    ],
)
def test_importing_loads_nothing_heavy(statement, banned):
    assert loaded_by(statement) & banned == set()


def closure(extra: str) -> set[str]:
    """Every distribution that `pip install fanlight[extra]` brings, by the installed metadata."""
    seen: set[str] = set()
    waiting = [Requirement(f"fanlight[{extra}]")]
    while waiting:
        wanted = waiting.pop()
        for line in metadata.requires(wanted.name) or []:
            needed = Requirement(line)
            applies = any(needed.marker is None or needed.marker.evaluate({"extra": e}) for e in wanted.extras or {""})
            key = f"{needed.name.lower()}[{','.join(sorted(needed.extras))}]"
            if applies and key not in seen:
                seen.add(key)
                waiting.append(needed)
    return {name.partition("[")[0] for name in seen}


# What an extra must not bring.
BANNED = {
    "gateway": {"torch", "numpy", "opencv-python-headless", "pillow", "diffusers"},
    "preprocessor": {"torch", "torchvision", "diffusers", "transformers"},
}


@pytest.mark.parametrize("extra", BANNED)
def test_an_extra_asks_for_nothing_heavy(extra):
    asked = closure(extra)

    assert "grpcio" in asked
    assert asked & BANNED[extra] == set()


def installed_into_nothing(extra: str) -> dict[str, str]:
    """What pip would install where nothing is installed yet, and in which versions."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run(
        [*command, "--constraint", "constraints.txt", f".[{extra}]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    if "No matching distribution" in done.stderr:
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr
    found = [row["metadata"] for row in json.loads(done.stdout)["install"]]
    return {row["name"].lower().replace("_", "-"): row["version"] for row in found}


@pytest.mark.parametrize("extra", BANNED)
def test_pip_brings_nothing_heavy_into_an_empty_environment(extra):
    brought = installed_into_nothing(extra)

    assert {"fanlight", "grpcio"} <= set(brought)
    assert set(brought) & BANNED[extra] == set()


@pytest.mark.slow
def test_the_annotators_extra_keeps_our_torch_and_the_headless_opencv():
    brought = installed_into_nothing("annotators")

    assert brought["torch"].partition("+")[0] == "2.13.0"
    assert brought["torchvision"].partition("+")[0] == "0.28.0"
    assert brought["controlnet-aux"] == "0.0.10"
    assert [name for name in brought if name.startswith("opencv")] == ["opencv-python-headless"]
    assert "mediapipe" not in brought
