"""One running Fanlight for all end-to-end tests, with a small random model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.running import Running, start_up, stop


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    from tests.fakes.models import make_tiny_model

    root = tmp_path_factory.mktemp("models")
    make_tiny_model(root)
    return root


@pytest.fixture(scope="session")
def running(tmp_path_factory, tiny_models) -> Iterator[Running]:
    started = start_up(tmp_path_factory.mktemp("up") / "data", tiny_models)
    yield started
    stop(started)
