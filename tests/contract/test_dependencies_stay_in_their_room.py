"""What a service must not load, told by a fresh interpreter; and what its extra must not bring, told by metadata."""

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

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
        ("import services.worker, services.kernel.rpc_server", HEAVY),
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


@pytest.mark.parametrize(
    ("extra", "banned"),
    [
        ("gateway", {"torch", "numpy", "opencv-python-headless", "pillow", "diffusers"}),
        ("preprocessor", {"torch", "torchvision", "diffusers", "transformers"}),
    ],
)
def test_an_extra_brings_nothing_heavy(extra, banned):
    brought = closure(extra)

    assert "grpcio" in brought
    assert brought & banned == set()
