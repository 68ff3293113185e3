"""An HTTP application on a real port of loopback, in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp

from services.gateway.http.connections import ConnectionLimits
from services.gateway.http.serving import bind_http, port_of, serve_http
from services.kernel.config import CommonSettings


@asynccontextmanager
async def serving(
    app: ASGIApp,
    *,
    address: str = "127.0.0.1:0",
    stop: asyncio.Event | None = None,
    limits: ConnectionLimits | None = None,
    **settings: Any,
) -> AsyncIterator[str]:
    """Its URL."""
    sockets = bind_http(address)
    port = port_of(sockets)
    stop = stop or asyncio.Event()
    async with asyncio.TaskGroup() as group:
        common = CommonSettings(**{"drain_grace_s": 1.0, **settings})
        group.create_task(serve_http(app, sockets, stop, common, limits))
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            stop.set()
