"""Damaged records over HTTP, for the operator alone."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from services.gateway.app.gateway import Gateway
from services.gateway.app.jobs import PAGE_SIZE, PAGE_SIZE_LIMIT
from services.gateway.http import docs
from services.gateway.http.bodies import FOR_OPERATORS, refuse_unknown
from services.gateway.http.json_messages import answer
from services.gateway.wire import records


class RecordRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["damaged records"], dependencies=[Depends(refuse_unknown), FOR_OPERATORS])
        add = router.add_api_route
        one = "/v1/damaged-records/{bucket}/{key:path}"
        add("/v1/damaged-records", self.list, methods=["GET"], **docs.LIST_DAMAGED_RECORDS)
        add(one, self.get, methods=["GET"], **docs.GET_DAMAGED_RECORD)
        add(one, self.remove, methods=["DELETE"], **docs.REMOVE_DAMAGED_RECORD)
        return router

    async def list(
        self,
        page_size: Annotated[int, Query(ge=0, le=PAGE_SIZE_LIMIT, description=f"0 means {PAGE_SIZE}.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
    ) -> Response:
        size = page_size or PAGE_SIZE
        return answer(records.page(await self._gateway.records.damaged_page(before=page_token, limit=size), size))

    async def get(self, bucket: str, key: str) -> Response:
        damaged, value = await self._gateway.records.damaged(bucket, key)
        return answer(records.damaged_record(damaged, value))

    async def remove(self, bucket: str, key: str) -> Response:
        return answer(records.damaged_record(await self._gateway.remove_damaged(bucket, key)))
