"""What `fanlight up` starts, and what each service is told. Starts nothing."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fanlight.cli.plugins import MissingExtra

STAGE_SERVICES = ("preprocessor", "diffusion")
STAGES = frozenset({"preprocess", "diffusion"})
# What tells that a service's extra is installed. Looked for, not imported.
_NEEDS = {
    "gateway": ("structlog", "uvloop", "fastapi", "uvicorn"),
    "preprocessor": ("structlog", "uvloop", "cv2", "PIL", "kornia_rs", "isal"),
    "diffusion": ("structlog", "uvloop", "torch", "diffusers", "tokenizers", "isal"),
}
# Running calls may take so long when all is stopped, unless the setting says otherwise.
DRAIN_GRACE_S = 10.0
GRACE_SETTING = "FANLIGHT_DRAIN_GRACE_S"
ANY_PORT = "127.0.0.1:0"
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def command_of(service: str) -> tuple[str, ...]:
    """-P: a folder `services` where the user happens to stand is none of ours."""
    return (sys.executable, "-P", "-m", f"services.{service}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for. A port 0 is chosen by the system, and then kept."""

    data: Path
    http: str
    grpc: str
    # Hears what happens to the services, a line each.
    tell: Callable[[str], None]
    # Hears the services' logs too, where it is given.
    follow: Callable[[str], None] | None = None
    command: Callable[[str], Sequence[str]] = command_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    http: str
    grpc: str

    @property
    def local_grpc(self) -> str:
        """Where the gateway answers on this machine, also when it listens everywhere."""
        host, _, port = self.grpc.rpartition(":")
        return f"{_EVERYWHERE.get(host, host)}:{port}"


def default_data() -> Path:
    """As the XDG base directory specification says."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / "fanlight"


def require_extras() -> None:
    """MissingExtra where a service cannot run for want of what its extra brings."""
    missing = {name: [need for need in needs if find_spec(need) is None] for name, needs in _NEEDS.items()}
    extras = [name for name, needs in missing.items() if needs]
    if extras:
        raise MissingExtra("`fanlight up`", extras, missing[extras[0]][0])


def environ_of_gateway(data: Path, http: str, grpc: str) -> dict[str, str]:
    return {"FANLIGHT_GATEWAY_DATA_DIR": str(data), "FANLIGHT_GATEWAY_HTTP": http, "FANLIGHT_GATEWAY_GRPC": grpc}


def environ_of_stage(service: str, addresses: Addresses) -> dict[str, str]:
    return {f"FANLIGHT_{service.upper()}_GRPC": ANY_PORT, "FANLIGHT_WORKER_GATEWAY": addresses.local_grpc}


def environ_of_all(lifeline_fd: int, environ: Mapping[str, str]) -> dict[str, str]:
    return {
        "FANLIGHT_LIFELINE_FD": str(lifeline_fd),
        GRACE_SETTING: environ.get(GRACE_SETTING, f"{DRAIN_GRACE_S:g}"),
    }


def grace_s(environ: Mapping[str, str]) -> float:
    """What is no number is for the services to refuse, in their words."""
    try:
        return float(environ[GRACE_SETTING])
    except ValueError:
        return DRAIN_GRACE_S
