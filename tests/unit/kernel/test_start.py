"""A service's process imports nothing at its start that it has no use for then."""

import subprocess
import sys

import pytest

from services.kernel.without import without


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("service", "unwanted"),
    [
        ("preprocessor", {"rich", "pygments", "httpx", "numpy.random", "scipy", "transformers", "aiobotocore"}),
        ("diffusion", {"rich", "pygments", "torch", "diffusers", "transformers", "aiobotocore"}),
        ("gateway", {"rich", "pygments", "httpx", "numpy", "aiobotocore", "nats"}),
    ],
)
def test_a_service_starts_without_what_it_may_never_need(service, unwanted):
    assert loaded_by(f"import services.{service}.__main__") & unwanted == set()


def test_what_was_kept_away_can_be_imported_afterwards():
    assert "rich.console" in loaded_by("import services.kernel.logs\nimport rich.console")


def test_what_is_imported_already_stays():
    with without("sys", "no_such_package"):
        assert sys.modules["sys"] is sys
        with pytest.raises(ImportError):
            import no_such_package  # noqa: F401
    assert "no_such_package" not in sys.modules
