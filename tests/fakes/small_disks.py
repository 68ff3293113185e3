"""File systems for tests: small ones, and ones that are read-only. They take root; elsewhere the test is skipped.

Also faults of a disk for tests that cannot mount one.
"""

import contextlib
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(at: Path, *words: str) -> Iterator[Path]:
    """`mount WORDS AT`, until this closes. Skips the test where that is not allowed."""
    at.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    done = subprocess.run(["mount", *words, str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def tmpfs(at: Path, size: str = "20m") -> contextlib.AbstractContextManager[Path]:
    return mounted(at, "-t", "tmpfs", "-o", f"size={size}", "none")


@contextlib.contextmanager
def read_only(folder: Path, at: Path) -> Iterator[Path]:
    """The folder once more, read-only."""
    with mounted(at, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(at)], check=True)
        yield at


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    path = folder / "something-else"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return path


def sqlite_error(code: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error
