"""A gateway over stores in memory, called over gRPC on loopback."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from services.gateway.__main__ import Access, _rpc_server
from services.gateway.adapters.encryption import Encryption
from services.gateway.adapters.jwt_people import PeopleVerifier
from services.gateway.app.tenants import Tenant, callers_of
from services.gateway.config import GatewaySettings
from services.kernel.config import GatewayCommonSettings
from tests.fakes.fleet import Fleet


@asynccontextmanager
async def serving(
    fleet: Fleet,
    common: GatewayCommonSettings | None = None,
    tenants: Sequence[Tenant] = (),
    people: PeopleVerifier | None = None,
) -> AsyncIterator[str]:
    """Its address; the fleet runs already."""
    common = common or GatewayCommonSettings(drain_grace_s=0)
    callers = callers_of(common.token_of_clients(), tenants, fleet.gateway.keys)
    fleet.gateway.keys.use_tokens(callers.tokens)
    access = Access(tenants=tenants, callers=callers, issuers=(), people=people)
    server = _rpc_server(fleet.gateway, fleet.blobs, GatewaySettings(), Encryption(common=common), access)
    port = server.bind("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()
