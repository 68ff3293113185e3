"""Imports without what a library would take along where it is installed. Knows no library."""

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
