"""The demo as `make demo` runs it, with a small random model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fanlight.cli.service_plan import locked

DEMO = Path(__file__).parents[2] / "demo" / "run.py"


def run(out: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(DEMO), str(out)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def all_have_gone(out: Path) -> bool:
    """Every process of the demo holds the data folder's lock."""

    def at_once(delay_s: float) -> None:
        pytest.fail("a process was left behind")

    with locked(out / "data", sleep=at_once):
        return True


def test_the_demo_writes_images_prints_its_times_and_leaves_no_process(tmp_path, tiny_models):
    done = run(tmp_path / "out", FANLIGHT_DIFFUSION_MODELS=str(tiny_models))

    assert done.returncode == 0, done.stderr
    for name in ("generated-1", "generated-2", "generated-3", "generated-4", "generated-outline"):
        assert Image.open(tmp_path / "out" / f"{name}.png").size == (64, 64)
    assert Image.open(tmp_path / "out" / "annotated-canny.png").size == (400, 400)
    assert Image.open(tmp_path / "out" / "control-canny.png").size == (64, 64)
    assert Image.open(tmp_path / "out" / "sheet.png").width > 1000
    assert "denoise" in done.stdout
    assert all_have_gone(tmp_path / "out")


def test_a_demo_that_fails_says_why_in_one_line(tmp_path):
    (tmp_path / "no-models").mkdir()
    done = run(tmp_path / "out", FANLIGHT_DIFFUSION_MODELS=str(tmp_path / "no-models"))

    assert done.returncode == 1
    assert "the demo failed: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert all_have_gone(tmp_path / "out")
