"""A service's process imports nothing at its start that it does not need then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.kernel.process import environment_defaults, without

TASKS = Path("/proc/self/task")


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("service", "unwanted"),
    [
        (
            "preprocessor",
            {
                "rich",
                "pygments",
                "httpx",
                "numpy.random",
                "scipy",
                "transformers",
                "aiobotocore",
                "services.weights.references.catalog",
            },
        ),
        ("diffusion", {"rich", "pygments", "torch", "diffusers", "transformers", "aiobotocore"}),
        ("gateway", {"rich", "pygments", "httpx", "numpy", "aiobotocore", "nats"}),
    ],
)
def test_a_service_starts_without_what_it_may_never_need(service, unwanted):
    assert loaded_by(f"import services.{service}.__main__") & unwanted == set()


def test_a_hidden_package_can_be_imported_afterwards():
    assert "rich.console" in loaded_by("import services.kernel.logs\nimport rich.console")


def test_a_package_that_is_imported_already_stays():
    with without("sys", "no_such_package"):
        assert sys.modules["sys"] is sys
        with pytest.raises(ImportError):
            import no_such_package  # noqa: F401
    assert "no_such_package" not in sys.modules


@pytest.mark.skipif(not TASKS.exists(), reason="lists a process's threads on Linux only")
def test_the_preprocessor_imports_without_threads_that_spin():
    code = f"import os, services.preprocessor.__main__\nprint(len(os.listdir({str(TASKS)!r})))"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    assert done.stdout.strip() == "1"


def test_environment_defaults_apply_only_inside_and_only_if_unset(monkeypatch):
    monkeypatch.setenv("FANLIGHT_TEST_SET", "theirs")
    monkeypatch.delenv("FANLIGHT_TEST_UNSET", raising=False)
    with environment_defaults(FANLIGHT_TEST_SET="ours", FANLIGHT_TEST_UNSET="ours"):
        assert (os.environ["FANLIGHT_TEST_SET"], os.environ["FANLIGHT_TEST_UNSET"]) == ("theirs", "ours")
    assert os.environ["FANLIGHT_TEST_SET"] == "theirs"
    assert "FANLIGHT_TEST_UNSET" not in os.environ
