"""What `fanlight up` starts: commands, settings and addresses of the services, and the data folder that they share.

Starts nothing. The folder has a lock, one `fanlight up` at a time, and a log file for each service.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from fanlight.channel import PLAIN_TEXT_SETTING, is_local
from fanlight.cli.session import MissingExtra, flag
from fanlight.errors import FanlightError, InvalidInput
from fanlight.worker_plan import STAGE_OF_SERVICE, WorkerCounts

STAGE_SERVICES = tuple(STAGE_OF_SERVICE)
STAGES = frozenset(STAGE_OF_SERVICE.values())
# The modules that show that a service's extra is installed. Searched for, not imported.
_NEEDS = {
    "gateway": ("structlog", "uvloop", "fastapi", "uvicorn"),
    "preprocessor": ("structlog", "uvloop", "cv2", "PIL", "kornia_rs", "isal"),
    "diffusion": ("structlog", "uvloop", "torch", "diffusers", "tokenizers", "isal"),
}
# How long running calls may take when the services stop, unless the setting says otherwise.
DRAIN_GRACE_S = 10.0
GRACE_SETTING = "FANLIGHT_DRAIN_GRACE_S"
ANY_PORT = "127.0.0.1:0"
OPERATOR_TOKENS = ("FANLIGHT_CLIENT_TOKEN", "FANLIGHT_CLIENT_TOKEN_FILE")
WORKER_TOKENS = ("FANLIGHT_WORKER_TOKEN", "FANLIGHT_WORKER_TOKEN_FILE")
DIRECT_TOKENS = ("FANLIGHT_WORKER_DIRECT_TOKEN", "FANLIGHT_WORKER_DIRECT_TOKEN_FILE")
# Settings that say where weights come from.
_OF_WEIGHTS = ("FANLIGHT_WEIGHTS_", "FANLIGHT_DIFFUSION_")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def command_of(service: str) -> tuple[str, ...]:
    """-P: a folder `services` in the working directory must not be imported."""
    return (sys.executable, "-P", "-m", f"services.{service}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlan:
    """What to start. The system chooses a port that is 0; a restarted gateway keeps it."""

    data: Path
    http: str
    grpc: str
    # Called with a line for each restart and stop.
    report: Callable[[str], None]
    # Called once the gateway is ready, for what else the stages need to know.
    introduce: "Callable[[Addresses], Awaitable[Mapping[str, str]]] | None" = None
    # Called with each line of the services' logs.
    follow: Callable[[str], None] | None = None
    workers: WorkerCounts = field(default_factory=WorkerCounts)
    command: Callable[[str], Sequence[str]] = command_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    http: str
    grpc: str
    # The roots of the gateway's certificate; None: it speaks no TLS.
    ca_file: Path | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it listens at an outer address of this machine alone, from which its workers seem to be strangers."""
        return not is_local(self.grpc) and self.grpc.rpartition(":")[0] not in _EVERYWHERE

    @property
    def local_grpc(self) -> str:
        """Where the gateway answers on this machine, also when it listens everywhere."""
        host, _, port = self.grpc.rpartition(":")
        return f"{_EVERYWHERE.get(host, host)}:{port}"


def default_data() -> Path:
    """As the XDG base directory specification says."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / "fanlight"


def known_addresses(plan: ProcessPlan, environ: Mapping[str, str]) -> Addresses | None:
    """Where the gateway will be, so that the stages can start with it; None where they must wait until it says so.

    They wait for a port that the system chooses, for roots that the gateway has yet to make, for an introduction, and
    where something else listens: its workers must not call that.
    """
    host, _, port = plan.grpc.rpartition(":")
    ca_file = ca_file_of(plan.data, plan.grpc, environ)
    addresses = Addresses(http=plan.http, grpc=plan.grpc, ca_file=ca_file)
    is_chosen = port.isdigit() and int(port) > 0
    if not is_chosen or addresses.is_elsewhere or (ca_file is not None and not ca_file.is_file()):
        return None
    return addresses if _is_free(host.strip("[]"), int(port)) else None


def _is_free(host: str, port: int) -> bool:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return False
    return True


def require_extras() -> None:
    """MissingExtra where a service cannot run because its extra is not installed."""
    missing = {name: [need for need in needs if find_spec(need) is None] for name, needs in _NEEDS.items()}
    extras = [name for name, needs in missing.items() if needs]
    if extras:
        raise MissingExtra("`fanlight up`", extras, missing[extras[0]][0])


def environ_of_gateway(data: Path, http: str, grpc: str) -> dict[str, str]:
    return {"FANLIGHT_GATEWAY_DATA_DIR": str(data), "FANLIGHT_GATEWAY_HTTP": http, "FANLIGHT_GATEWAY_GRPC": grpc}


def ca_file_of(data: Path, grpc: str, environ: Mapping[str, str]) -> Path | None:
    """Where the roots are of the certificate that the gateway has, which listens there; None: it speaks no TLS.

    InvalidInput for one that its own workers could not trust.
    """
    named = environ.get("FANLIGHT_TLS_CA_FILE")
    if environ.get("FANLIGHT_TLS_CLIENT_CA_FILE"):
        raise InvalidInput(
            "FANLIGHT_TLS_CLIENT_CA_FILE is set: `fanlight up` has no certificates for its own workers; start gateway"
            " and workers by themselves"
        )
    if environ.get("FANLIGHT_TLS_CERT_FILE"):
        if not named:
            raise InvalidInput(
                "FANLIGHT_TLS_CERT_FILE is set: set FANLIGHT_TLS_CA_FILE too, to the roots that signed it; the workers"
                " here call the gateway with TLS"
            )
        return Path(named)
    if is_local(grpc) or flag(environ, PLAIN_TEXT_SETTING):
        return None
    return data / "tls" / "authority.pem"


def environ_of_stage(service: str, addresses: Addresses, environ: Mapping[str, str]) -> dict[str, str]:
    """Where the gateway needs tokens, direct calls to a stage need one too: their own, or one that nobody knows."""
    own = {
        f"FANLIGHT_{service.upper()}_GRPC": ANY_PORT,
        "FANLIGHT_WORKER_GATEWAY": addresses.local_grpc,
        # The supervisor starts the others itself.
        "FANLIGHT_WORKER_PROCESSES": "1",
        "FANLIGHT_TLS_CA_FILE": str(addresses.ca_file or ""),
    }
    if any(environ.get(name) for name in OPERATOR_TOKENS) and not any(environ.get(name) for name in DIRECT_TOKENS):
        own["FANLIGHT_WORKER_DIRECT_TOKEN"] = secrets.token_urlsafe(32)
    return own


def is_for_stages(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a stage gets this variable: not the operator's tokens and the gateway's settings and, unless weights come
    from S3, no keys for S3, which are the gateway's for its blobs."""
    if name.startswith("AWS_") and any(word in name for word in ("KEY", "TOKEN", "CREDENTIAL", "PROFILE")):
        return any("s3" in f"{each} {value}".lower() for each, value in environ.items() if each.startswith(_OF_WEIGHTS))
    return not name.startswith(("FANLIGHT_GATEWAY", "FANLIGHT_CLIENT_TOKEN", "FANLIGHT_TOKEN"))


def environ_of_all(lifeline_fd: int, environ: Mapping[str, str]) -> dict[str, str]:
    return {
        "FANLIGHT_LIFELINE_FD": str(lifeline_fd),
        GRACE_SETTING: environ.get(GRACE_SETTING, f"{DRAIN_GRACE_S:g}"),
        **_worker_token(environ),
    }


def _worker_token(environ: Mapping[str, str]) -> dict[str, str]:
    """Where clients need a token, the workers here need one too: that of the settings, or one that nobody knows."""
    is_needed = any(environ.get(name) for name in OPERATOR_TOKENS)
    is_given = any(environ.get(name) for name in WORKER_TOKENS)
    return {"FANLIGHT_WORKER_TOKEN": secrets.token_urlsafe(32)} if is_needed and not is_given else {}


def grace_s(environ: Mapping[str, str]) -> float:
    """The default where the setting is not a number: the services refuse it with an error of their own."""
    try:
        return float(environ[GRACE_SETTING])
    except ValueError:
        return DRAIN_GRACE_S


# How long to wait for the children of an `up` that was killed.
WAIT_S = 30.0
TRY_EVERY_S = 0.2


class DataInUse(FanlightError):
    code = "FAILED_PRECONDITION"


@contextlib.contextmanager
def locked(
    folder: Path, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[int]:
    """A file descriptor that locks the folder, also in every process that it is passed to.

    DataInUse while another `up` runs. Where only its children are left, waits for them.
    """
    descriptor = _open(folder)
    try:
        until_s = clock() + WAIT_S
        while not _try(descriptor):
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            if _lives(owner) or clock() >= until_s:
                raise DataInUse(
                    f"{folder} is in use by another `fanlight up` (process {owner}): name another with --data"
                )
            sleep(TRY_EVERY_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(folder / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be used for data: {error.strerror}") from error


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lives(owner: str) -> bool:
    """Whether the process exists. Another process may have its number by now; then the error names that one."""
    if not owner.isdigit():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# One such file and the one before it are kept.
LOG_LIMIT_BYTES = 32 * 1024 * 1024
TAIL_BYTES = 16 * 1024


def _private(path: str, flags: int) -> int:
    """Logs name jobs and models, which are for their user alone."""
    return os.open(path, flags, 0o600)


class LogFile:
    def __init__(self, path: Path, *, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
        self.path = path
        self._limit_bytes = limit_bytes

    def open(self) -> BinaryIO:
        """For appending, as a child's standard error."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.trim()
        return open(self.path, "ab", opener=_private)

    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def trim(self) -> None:
        """Rotates a log that is too large. Writers append, so they continue at the new end."""
        if self.size_bytes() > self._limit_bytes:
            shutil.copy(self.path, self.path.with_suffix(".log.1"))
            with self.path.open("r+b") as file:
                file.truncate(0)

    def last_line(self, *, since_bytes: int) -> str:
        """The last line that was written since; empty where there is none."""
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(max(since_bytes, self.size_bytes() - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    async def follow(
        self, write: Callable[[str], None], *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Every whole line from now on, until cancelled."""
        at, rest = self.size_bytes(), b""
        while True:
            if self.size_bytes() < at:
                at, rest = 0, b""
            if self.size_bytes() > at:
                with self.path.open("rb") as file:
                    file.seek(at)
                    new = file.read()
                at += len(new)
                *lines, rest = (rest + new).split(b"\n")
                for line in lines:
                    write(line.decode(errors="replace"))
            await sleep(0.2)
