"""A gateway over stores in memory, called over gRPC on loopback."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.__main__ import _rpc_server
from services.kernel.config import GatewayCommonSettings
from tests.fakes.fleet import Fleet


@asynccontextmanager
async def serving(fleet: Fleet) -> AsyncIterator[str]:
    """Its address; the fleet runs already."""
    server = _rpc_server(fleet.gateway, fleet.blobs, GatewayCommonSettings(drain_grace_s=0), [], polls=100)
    port = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()
