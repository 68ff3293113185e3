"""What must never be in a log."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from services.kernel.logs import configure, get_logger
configure(level="info", style=sys.argv[1], service="test")
def fail():
    prompt = "a secret" + " garden"
    raise KeyError("of no use")
try:
    fail()
except KeyError:
    get_logger().exception("handler_failed", reference="abc")
"""


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_logged_traceback_shows_no_local_variable(style: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, style], capture_output=True, text=True, check=True, timeout=60
    )
    assert "handler_failed" in done.stderr
    assert "KeyError" in done.stderr
    assert "secret garden" not in done.stderr
