"""How a command calls the gateway: address, token, Ctrl-C, advice in errors; and the files that it reads and writes."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fanlight.errors import CallFailed, FanlightError, InvalidInput, JobFailed, advice

if TYPE_CHECKING:
    from fanlight.client import AsyncClient

Answer = TypeVar("Answer")


class MissingExtra(FanlightError):
    """A part of Fanlight that is not installed here."""

    code = "UNIMPLEMENTED"

    def __init__(self, what: str, extras: Iterable[str], missing: str) -> None:
        names = ",".join(extras) or "all"
        super().__init__(f"{what} needs {missing}, which is not installed: pip install 'fanlight[{names}]'")


def talk(gateway: str, work: "Callable[[AsyncClient], Awaitable[Answer]]") -> Answer:
    """Runs the work with a client. Errors get advice for the person at the terminal."""
    try:
        with asyncio.Runner() as runner, _woken_by_signals(runner.get_loop()):
            return runner.run(_talk(gateway, work))
    except FanlightError as error:
        error.message = _with_field(error, advice(error, gateway=gateway))
        raise


def _with_field(error: FanlightError, text: str) -> str:
    """Errors that the client raises name the field as the gateway's errors do."""
    is_named = not error.field or isinstance(error, CallFailed | JobFailed)
    return text if is_named else f"{error.field}: {text}"


@contextlib.contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Every signal wakes the loop, so that Ctrl-C ends a command at once.

    asyncio.Runner handles SIGINT when the wait for the next event ends. A signal that arrives just before that wait
    begins, or at another thread, does not end it: the command would go on waiting until the next event.
    """
    # On Windows the loop does this itself. Python handles signals on the main thread only.
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        loop.add_reader(reader, reader.recv, 4096)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(reader)


async def _talk(gateway: str, work: "Callable[[AsyncClient], Awaitable[Answer]]") -> Answer:
    from fanlight.client import AsyncClient

    certificate = certificate_of(os.environ)
    plain_text = _wants_plain_text(gateway)
    async with AsyncClient(
        gateway, token=_token(), ca_file=_path("FANLIGHT_TLS_CA_FILE"), certificate=certificate, plain_text=plain_text
    ) as client:
        return await work(client)


def _path(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value) if value else None


def certificate_of(environ: Mapping[str, str]) -> tuple[Path, Path] | None:
    """The files of the client certificate and its key. InvalidInput where one of them is missing."""
    files = [environ.get(f"FANLIGHT_TLS_{part}_FILE", "") for part in ("CERT", "KEY")]
    if any(files) and not all(files):
        raise InvalidInput("FANLIGHT_TLS_CERT_FILE and FANLIGHT_TLS_KEY_FILE go together: set both or none")
    return (Path(files[0]), Path(files[1])) if all(files) else None


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Of a setting that is true or false, as the services read it. InvalidInput."""
    value = environ.get(name, "").strip().lower()
    if value not in (*_FALSE, *_TRUE):
        raise InvalidInput(f"{name}: must be true or false")
    return value in _TRUE


_FALSE, _TRUE = ("", "0", "false", "no", "off", "f", "n"), ("1", "true", "yes", "on", "t", "y")


def _wants_plain_text(gateway: str) -> bool:
    """Whether FANLIGHT_PLAIN_TEXT is set; warns where that matters."""
    from fanlight.channel import PLAIN_TEXT_SETTING, PLAIN_TEXT_WARNING, is_local
    from fanlight.cli.output import say

    if not flag(os.environ, PLAIN_TEXT_SETTING):
        return False
    if not is_local(gateway) and _path("FANLIGHT_TLS_CA_FILE") is None:
        say(f"warning: {PLAIN_TEXT_SETTING} is set: {PLAIN_TEXT_WARNING}")
    return True


def _token() -> str:
    file = os.environ.get("FANLIGHT_TOKEN_FILE")
    if token := os.environ.get("FANLIGHT_TOKEN"):
        return token
    return read_text(Path(file)).strip() if file else ""


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error


def make_folder(path: Path) -> None:
    """Called before anything is sent, so that a job's images are not lost for a folder that cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be created: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InvalidInput(f"{path}: cannot be written to")


def write_bytes(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error


def write_secret(path: Path, text: str) -> None:
    """Whole or not at all, for the file's owner alone."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(text)
        partial.replace(path)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror}") from error
