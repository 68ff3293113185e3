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


SPEAKER = """
import logging, sys
from services.kernel.logs import configure, get_logger
configure(level="info", style=sys.argv[1], service="test")
evil = "a" + chr(27) + "[2J" + chr(0x202e) + chr(0x9b)
get_logger().info("worker_joined", worker=evil)
logging.getLogger("library").warning(evil)
"""


@pytest.mark.parametrize("style", ["json", "console"])
def test_text_of_strangers_cannot_control_the_terminal_that_shows_a_log(style: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPEAKER, style], capture_output=True, text=True, check=True, timeout=60
    )
    assert r"\x1b[2J\u202e\x9b" in done.stderr
    assert all(each.isprintable() for line in done.stderr.split("\n") for each in line)
