"""Whether requests may be sent to this gateway, asked by `/readyz` and by the gRPC health service."""

import asyncio

from fanlight.errors import Unavailable
from services.gateway.app.gateway import Gateway

STORE_TIMEOUT_S = 2.0
RETRY_AFTER_S = 1.0


async def require_ready(gateway: Gateway) -> None:
    """Unavailable while the gateway starts or drains, and while its store accepts no writes."""
    if not gateway.ready:
        raise Unavailable("starting or draining", retry_after_s=RETRY_AFTER_S)
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            await gateway.probe.write()
    except TimeoutError as error:
        raise Unavailable("the store does not answer", retry_after_s=RETRY_AFTER_S) from error
