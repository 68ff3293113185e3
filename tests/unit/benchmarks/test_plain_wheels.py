"""The wheels of the image that `benchmarks.cold_start` compares with are all that pip asks for."""

import importlib.util
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKER = Path(__file__).parents[3] / "docker"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCKER))
    spec = importlib.util.spec_from_file_location("docker_build", DOCKER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_that_a_package_asks_for_is_missing(build: ModuleType) -> None:
    names = {pin.name for pin in build.plain_pins()}
    assert {"torch", "diffusers", "requests", "setuptools", "hf-xet"} <= names
    for name in names:
        asked = [Requirement(line) for line in requires(name) or ()]
        needed = {
            canonicalize_name(each.name) for each in asked if not each.marker or each.marker.evaluate({"extra": ""})
        }
        assert needed <= names, f"{name} asks for {needed - names}"


def test_our_own_layers_do_not_hold_them_all(build: ModuleType) -> None:
    """Or there were nothing to fetch beside them."""
    lines = [line for path in (DOCKER / "locks").glob("*.txt") for line in path.read_text().splitlines()]
    locked = {line.partition("=")[0] for line in lines if not line.startswith("#")}
    assert {"torch", "diffusers"} <= locked
    assert {pin.name for pin in build.plain_pins()} - locked
