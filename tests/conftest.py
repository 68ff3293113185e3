"""For all tests: how log events are written. By default a traceback shows every variable, and takes seconds."""

from collections.abc import Iterator

import pytest
import structlog


def _write_short_tracebacks() -> None:
    structlog.reset_defaults()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ]
    )


_write_short_tracebacks()


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that runs within a test sets logs up for itself, on a stream that is closed when it ends."""
    yield
    structlog.contextvars.clear_contextvars()
    _write_short_tracebacks()
