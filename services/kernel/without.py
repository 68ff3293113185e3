"""Imports without what a library would take along, or start, where it is installed. Knows no library."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Inside, those that are not imported yet seem not to be installed, to all threads: for imports at the start."""
    absent = [name for name in packages if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python itself marks what cannot be imported
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def unless_set(**variables: str) -> Iterator[None]:
    """Inside, the environment has these where it has nothing by their name: for what a library reads as it is imported.

    Other libraries that read the same name later, and processes started from here, never see it.
    """
    absent = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del os.environ[name]
