"""Imports a library without optional packages that it would load, or settings it would read. Knows no library."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Inside, packages that are not imported yet look as if they were not installed, in all threads.

    For imports at the start of a process.
    """
    absent = [name for name in packages if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python itself marks what cannot be imported
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def environment_defaults(**variables: str) -> Iterator[None]:
    """Inside, environment variables that are not set have these values: for what a library reads while it is imported.

    Libraries that read the same variable later, and child processes, never see these values.
    """
    absent = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del os.environ[name]
