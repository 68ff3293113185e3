"""`/healthz`: the process answers. `/readyz`: it should be sent requests. Both need no token."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from fanlight.errors import Unavailable
from services.gateway.app.gateway import Gateway
from services.gateway.http import documents
from services.gateway.http.json_messages import of_value

STORE_PATIENCE_S = 2.0
RETRY_AFTER_S = 1.0


class HealthRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["health"])
        router.add_api_route("/healthz", self.alive, methods=["GET"], **documents.HEALTHZ)
        router.add_api_route("/readyz", self.ready, methods=["GET"], **documents.READYZ)
        return router

    async def alive(self) -> Response:
        return of_value({"status": "alive"})

    async def ready(self) -> Response:
        if not self._gateway.ready:
            raise Unavailable("starting or draining", retry_after_s=RETRY_AFTER_S)
        try:
            async with asyncio.timeout(STORE_PATIENCE_S):
                await self._gateway.probe.write()
        except TimeoutError as error:
            raise Unavailable("the store does not answer", retry_after_s=RETRY_AFTER_S) from error
        return of_value({"status": "ready"})
