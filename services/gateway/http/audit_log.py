"""The audit log over HTTP, for the operator: CloudEvents, one a line, listed or as they come."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response, StreamingResponse

from fanlight.contract.audit_log import AuditEntry, event_of
from fanlight.errors import FanlightError
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.gateway import Gateway
from services.gateway.http import docs
from services.gateway.http.bodies import FOR_OPERATORS, HttpOptions, refuse_unknown
from services.gateway.http.json_messages import answer, text
from services.gateway.wire import audit_log as wire

LINES = "application/x-ndjson"
NEXT_PAGE = "Next-Page-Token"
_HEADERS = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}


class AuditLogRoutes:
    def __init__(self, gateway: Gateway, options: HttpOptions) -> None:
        self._gateway, self._options = gateway, options

    def router(self) -> APIRouter:
        router = APIRouter(tags=["audit log"], dependencies=[Depends(refuse_unknown), FOR_OPERATORS])
        add = router.add_api_route
        add("/v1/audit-log", self.list, methods=["GET"], **docs.LIST_AUDIT_ENTRIES)
        add("/v1/audit-log/chains", self.chains, methods=["GET"], **docs.LIST_AUDIT_CHAINS)
        return router

    async def list(
        self,
        page_size: Annotated[int, Query(ge=0, le=wire.PAGE_SIZE_LIMIT, description=f"0 means {wire.PAGE_SIZE}.")] = 0,
        page_token: Annotated[str, Query(description="`Next-Page-Token` of the page before.")] = "",
        follow: Annotated[bool, Query(description="Entries as they are written, from now on.")] = False,
    ) -> Response:
        if follow:
            self._gateway.audit.require_follower_place()
            lines = _followed(self._gateway.audit, self._options.heartbeat_s)
            return StreamingResponse(lines, media_type=LINES, headers=_HEADERS)
        size = page_size or wire.PAGE_SIZE
        entries, next_token = await self._gateway.audit.page(before=page_token, limit=size)
        headers = {**_HEADERS, NEXT_PAGE: next_token}
        return Response(b"".join(map(_line, entries)), media_type=LINES, headers=headers)

    async def chains(self) -> Response:
        return answer(wire.chains(await self._gateway.audit.chains()))


def _line(entry: AuditEntry) -> bytes:
    return text(event_of(entry)).encode() + b"\n"


async def _followed(log: AuditLog, heartbeat_s: float) -> AsyncIterator[bytes]:
    with log.followed() as entries:
        async for line in _with_blanks(entries, heartbeat_s):
            yield line


async def _with_blanks(entries: AsyncIterator[AuditEntry], heartbeat_s: float) -> AsyncIterator[bytes]:
    """Lines, and an empty one at once and whenever none came for that long, so that the connection stays open."""
    yield b"\n"
    following: asyncio.Task[AuditEntry | None] | None = None
    try:
        while True:
            following = following or asyncio.create_task(_next(entries))
            done, _ = await asyncio.wait({following}, timeout=heartbeat_s)
            if not done:
                yield b"\n"
                continue
            try:
                entry = following.result()
            except FanlightError:
                return
            following = None
            if entry is None:
                return
            yield _line(entry)
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait({following})


async def _next(entries: AsyncIterator[AuditEntry]) -> AuditEntry | None:
    return await anext(entries, None)
