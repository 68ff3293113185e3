"""When the gateway knows a live worker of every stage: only then can it be given work."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fanlight.cli.session import read_text
from fanlight.cli.up.plan import STAGES, Addresses

if TYPE_CHECKING:
    from fanlight.client import AsyncClient

ASK_EVERY_S = 0.2


async def all_registered(addresses: Addresses, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Returns once they have. CallFailed where the gateway cannot be asked."""
    async with client_beside(addresses) as client:
        while True:
            workers = await client.list_workers()
            if {status.worker.stage for status in workers if status.live} >= STAGES:
                return
            await sleep(ASK_EVERY_S)


def client_beside(addresses: Addresses) -> "AsyncClient":
    """For the gateway that was started beside us, with the token and the roots that go with its settings."""
    from fanlight.client import AsyncClient

    return AsyncClient(addresses.local_grpc, token=_token(), ca_file=_ca_file())


def _token() -> str:
    """What the gateway beside us was told to take from clients."""
    if token := os.environ.get("FANLIGHT_CLIENT_TOKEN"):
        return token
    file = os.environ.get("FANLIGHT_CLIENT_TOKEN_FILE")
    return read_text(Path(file)).strip() if file else ""


def _ca_file() -> Path | None:
    """Only a gateway with a certificate is spoken to with TLS."""
    file = os.environ.get("FANLIGHT_TLS_CA_FILE")
    return Path(file) if file and os.environ.get("FANLIGHT_TLS_CERT_FILE") else None
