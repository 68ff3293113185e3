"""Tenants over HTTP, for the operator, and everybody's own quota."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from fanlight.tenants.v1 import tenants_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.http import docs
from services.gateway.http.bodies import FOR_OPERATORS, HttpOptions, Operator, QueueReader, read_json, refuse_unknown
from services.gateway.http.json_messages import answer, fill
from services.gateway.wire import tenants as wire


class TenantRoutes:
    def __init__(self, gateway: Gateway, options: HttpOptions) -> None:
        self._gateway, self._quotas, self._options = gateway, gateway.quotas, options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["tenants"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        operators = [FOR_OPERATORS]
        add("/v1/quota", self.quota, methods=["GET"], **docs.GET_QUOTA)
        add("/v1/tenants", self.list, methods=["GET"], dependencies=operators, **docs.LIST_TENANTS)
        add("/v1/tenants/{name}", self.get, methods=["GET"], dependencies=operators, **docs.GET_TENANT)
        add("/v1/tenants/{name}", self.set, methods=["PATCH"], dependencies=operators, **docs.SET_TENANT)
        add("/v1/tenants/{name}", self.delete, methods=["DELETE"], **docs.DELETE_TENANT)
        rotate = "/v1/tenants/{name}:rotate-data-key"
        add(rotate, self.rotate, methods=["POST"], dependencies=operators, **docs.ROTATE_DATA_KEY)
        add("/v1/sealing", self.sealing, methods=["GET"], dependencies=operators, **docs.GET_SEALING)
        return router

    async def quota(
        self, caller: QueueReader, tenant: Annotated[str, Query(description="Empty: your own.")] = ""
    ) -> Response:
        name = wire.quota_of(caller, tenant)
        return answer(wire.quota(name, self._quotas.uses(name)))

    async def list(
        self,
        page_size: Annotated[int, Query(ge=0, le=wire.PAGE_SIZE_LIMIT, description=f"0 means {wire.PAGE_SIZE}.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
    ) -> Response:
        size = page_size or wire.PAGE_SIZE
        return answer(wire.page(self._quotas.page(after=page_token, limit=size), size))

    async def get(self, name: str) -> Response:
        return answer(wire.tenant(self._quotas.get(wire.name(name, field="name"))))

    async def set(self, request: Request, name: str) -> Response:
        message = tenants_pb2.SetTenantRequest()
        fill(message, await read_json(request, self._options))
        message.name = wire.name(name, field="name")
        return answer(wire.tenant(await self._quotas.change(message.name, wire.change(message))))

    async def delete(self, name: str, caller: Operator) -> Response:
        deleted = await self._gateway.tenant_deletions.delete(wire.name(name, field="name"), caller)
        return answer(wire.deleted(deleted), status=200 if deleted.is_done else 202)

    async def rotate(self, name: str) -> Response:
        tenant = wire.name(name, field="name")
        number = await self._gateway.rotate_data_key(tenant)
        return answer(tenants_pb2.RotateDataKeyResponse(tenant=tenant, number=number))

    async def sealing(self) -> Response:
        return answer(wire.sealing(await self._gateway.sealing.report()))
