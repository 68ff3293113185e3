"""A service's process: its event loop, signals, the lifeline to its parent, blocking work on threads, its GPUs,
and imports without what a library would load or read.

A ProcessEnd, such as an error in settings, ends it with one line and its exit code. Knows no service, and loads no
network library to count GPUs.
"""

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from typing import NoReturn, TypeVar

import uvloop

from services.kernel.config import ProcessEnd, SettingsError

Main = Callable[[asyncio.Event], Awaitable[None]]

Result = TypeVar("Result")

_CUDA = "cuda"


def run(main: Main, *, lifeline_fd: int | None = None) -> int:
    """Run `main` until it ends and return the exit code. SIGTERM, SIGINT or a broken lifeline set its event."""
    code = 0
    try:
        uvloop.run(_run(main, lifeline_fd))
    except* ProcessEnd as group:
        for error in _ends_in(group):
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            code = max(code, error.exit_code)
    return code


def _ends_in(group: BaseExceptionGroup[ProcessEnd]) -> Iterator[ProcessEnd]:
    """The errors themselves, out of the groups of all task groups between."""
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _ends_in(each)
        else:
            yield each


def leave(code: int) -> NoReturn:
    """End the process now: `main` has cleaned up all that matters, and unloading gRPC or torch takes seconds."""
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
    """Stop when the other end of the pipe closes: the system closes it when that process ends in any way."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 64):
                pass
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


async def run_blocking(
    executor: Executor, work: Callable[[], Result], *, on_cancel: Callable[[], None] = lambda: None
) -> Result:
    """Run blocking work on a thread of the executor.

    On cancellation, waits for the running work to finish (or cancels it before it starts), because the thread still
    uses its arguments. `on_cancel` is called first and may speed that up. The work's own error is then dropped.
    """
    job = executor.submit(work)
    working = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        on_cancel()
        if not job.cancel():
            await asyncio.wait([working])
            working.exception()  # marks it as retrieved, so that asyncio does not log it
        raise


def count_gpus() -> int:
    """How many GPUs NVIDIA's driver shows to this process; 0 if there is no driver, or none that works."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    found = ctypes.c_int()
    works = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(found)) == 0
    return found.value if works else 0


# CUDA's numbers of a device's attributes: its compute capability.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NAME_LIMIT_BYTES = 256


def card_of(number: int) -> tuple[str, tuple[int, int]] | None:
    """Name and compute capability of a GPU, such as ("NVIDIA GeForce GTX 1660", (7, 5)); None where it says neither."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if not 0 <= number < count_gpus():
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_LIMIT_BYTES)
    results = (
        driver.cuDeviceGet(ctypes.byref(device), number),
        driver.cuDeviceGetName(name, _NAME_LIMIT_BYTES - 1, device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device),
    )
    return None if any(results) else (name.value.decode(errors="replace"), (major.value, minor.value))


def check_device(device: str, *, setting: str) -> None:
    """SettingsError if the device is a GPU, as `cuda` or `cuda:N`, that does not exist: no work would ever succeed."""
    kind, _, number = device.partition(":")
    if kind != _CUDA:
        return
    found = count_gpus()
    if int(number or 0) >= found:
        raise SettingsError(
            f"{setting} is {device}, and NVIDIA's driver shows {found} GPUs to this process; set auto or cpu, or make"
            " the GPU visible to it"
        )


@contextlib.contextmanager
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


@contextlib.contextmanager
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


@contextlib.contextmanager
def long_imports() -> Iterator[None]:
    """Inside, what a large library makes while it is imported is not searched for garbage, nor is it ever afterwards.

    Python searches all objects again and again while they grow in number: a fifth of the time of importing torch, and
    afterwards 0.2 s for each full search.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


# What macOS allows at most where the hard limit is none.
OPEN_FILES_LIMIT = 65_536


def raise_open_files_limit() -> None:
    """A server has a file for each connection, and the usual soft limit, 1,024, is meant for other programs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_LIMIT if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_LIMIT)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
