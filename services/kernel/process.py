"""The frame of a service's process: its event loop, signals, the lifeline to whoever started it, errors as one line."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn

import uvloop

from services.kernel.config import SettingsError
from services.kernel.logs import get_logger

log = get_logger()

Main = Callable[[asyncio.Event], Awaitable[None]]


def run(main: Main, *, lifeline_fd: int | None = None) -> int:
    """Run `main` until it ends; its event is set by SIGTERM, SIGINT or a broken lifeline. The exit code."""
    code = 0
    try:
        uvloop.run(_run(main, lifeline_fd))
    except* SettingsError as group:
        for error in group.exceptions:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        code = 2
    return code


def leave(code: int) -> NoReturn:
    """End the process now: `main` has ended all that is worth an end, and taking gRPC or torch apart takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _run(main: Main, lifeline_fd: int | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    if lifeline_fd is not None:
        _watch(lifeline_fd, loop, stop)
    await main(stop)


def _watch(fd: int, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Stop when the other end of the pipe closes, which the system does when that process dies in any way."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 64):
                pass
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
