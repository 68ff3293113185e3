"""The audit is a program of its own beside the packages: its folder is put on the path, as Python does for it."""

import sys
from pathlib import Path

import pytest

from tests.fakes.images import OciLayout

DOCKER = Path(__file__).parents[3] / "docker"
sys.path.insert(0, str(DOCKER))


@pytest.fixture
def layout(tmp_path):
    return OciLayout(tmp_path / "layout")
