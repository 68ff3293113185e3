"""What must never be in a log, and how the lines of libraries look there."""

import json
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
    escaped = r"\u001b[2J\u202e\u009b" if style == "json" else r"\x1b[2J\u202e\x9b"
    assert done.stderr.count(escaped) == 2
    assert all(each.isprintable() for line in done.stderr.split("\n") for each in line)


LIBRARIES = """
import logging, threading, warnings
from services.kernel.logs import configure, get_logger
configure(level="info", style="json", service="test")
get_logger().info("worker_joined")
def fail():
    secret = "a secret" + " garden"
    try:
        raise KeyError("of no use")
    except KeyError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
logging.getLogger("uvicorn.error").warning("%s:%d - refused", "127.0.0.1", 80)
warnings.warn("of a library")
"""


def test_every_line_of_a_json_log_is_json_with_the_service() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["service"] for line in lines] == ["test"] * 4
    assert [line["event"] for line in lines[:3]] == [
        "worker_joined",
        "Exception in ASGI application",
        "127.0.0.1:80 - refused",
    ]
    assert [line["level"] for line in lines] == ["info", "error", "warning", "warning"]
    assert lines[1]["logger"] == "uvicorn.error"
    assert lines[1]["exception"][0]["exc_type"] == "KeyError"
    assert "of a library" in lines[3]["event"]
    assert "secret garden" not in done.stderr
