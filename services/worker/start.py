"""The start of a worker beside others on one machine: its wait for the gateway, and what it says of itself when warm.

Knows no stage.
"""

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from fanlight.channel import is_local
from services.worker.retry import Env

# How often a gateway that does not listen yet is tried.
TRY_EVERY_S = 0.05
_PRIVATE = re.compile(r"^Private_Dirty:\s+(\d+) kB$", re.MULTILINE)


async def until_listens(gateway: str, stop: asyncio.Event, *, wait_s: float, env: Env) -> None:
    """Return once the gateway on this machine takes connections; at once for others, or after `wait_s`.

    A gRPC channel that was refused once would wait for a second.
    """
    if not wait_s or not is_local(gateway) or "," in gateway:
        return
    host, _, port = gateway.rpartition(":")
    end_s = env.now_s() + wait_s
    while not stop.is_set() and env.now_s() < end_s:
        try:
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            await env.sleep(TRY_EVERY_S)
            continue
        writer.close()
        return


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one worker uses: the cores that its work keeps busy, and the GPUs that it may use."""

    cores: float = 1.0
    cards: int = 0


def say_warm(*, cores: float, cards: int) -> None:
    """Print what one worker uses, for whoever started it. `cores`: that its work kept busy; `cards`: it may use."""
    print(f"warm cores={cores:.2f} memory_bytes={private_bytes()} cards={cards}", flush=True)  # noqa: T201


def private_bytes(file: Path = Path("/proc/self/smaps_rollup")) -> int:
    """What this process has for itself. Weights that are mapped from a file are shared; 0 where it is not known."""
    try:
        found = _PRIVATE.search(file.read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
