"""`/v1/dead-letters`: tasks whose attempts are spent, looked at and tried anew."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from services.gateway.app.gateway import Gateway
from services.gateway.http import documents
from services.gateway.http.json_messages import answer
from services.gateway.http.parameters import Asking, refuse_unknown
from services.gateway.wire import answers

PAGE_SIZE = 50


class DeadLetterRoutes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def router(self) -> APIRouter:
        router = APIRouter(tags=["dead letters"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        one = "/v1/dead-letters/jobs/{job_id}/tasks/{number}"
        add("/v1/dead-letters", self.list, methods=["GET"], **documents.LIST_DEAD_LETTERS)
        add(f"{one}:redrive", self.redrive, methods=["POST"], **documents.REDRIVE_DEAD_LETTER)
        add(one, self.get, methods=["GET"], **documents.GET_DEAD_LETTER)
        return router

    async def list(
        self,
        caller: Asking,
        page_size: Annotated[int, Query(ge=0, le=1_000, description="0 means 50.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
    ) -> Response:
        size = page_size or PAGE_SIZE
        letters = await self._gateway.dead_letters.page(before=page_token, limit=size, caller=caller)
        return answer(answers.dead_letters(letters, size))

    async def get(self, job_id: str, number: str, caller: Asking) -> Response:
        letter = await self._gateway.dead_letters.get(f"jobs/{job_id}/tasks/{number}", caller)
        return answer(answers.dead_letter(letter))

    async def redrive(self, job_id: str, number: str, caller: Asking) -> Response:
        job = await self._gateway.redrives.redrive(f"jobs/{job_id}/tasks/{number}", caller)
        return answer(answers.job(self._gateway.explanations.with_estimate(job)))
