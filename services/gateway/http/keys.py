"""API keys over HTTP, and sessions for people at a browser, whose key is in a cookie that scripts cannot read."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from fanlight.errors import ResourceExhausted, Unauthenticated
from fanlight.keys.v1 import keys_pb2
from services.gateway.app.gateway import Gateway
from services.gateway.app.keys import CreatedKey, PersonVerifier, require_proof
from services.gateway.http import docs
from services.gateway.http.bodies import HttpOptions, Manager, read_json, refuse_unknown
from services.gateway.http.credentials import COOKIE
from services.gateway.http.json_messages import answer, fill
from services.gateway.wire import keys as wire

SMALL_BODY_BYTES = 64 * 1024
SMALL_BODY_IDLE_S = 5.0
# How many people may sign in at a time.
SIGN_INS_LIMIT = 32


class SignIns:
    """Places of their own, so that strangers who keep signing in take none of other requests."""

    def __init__(self) -> None:
        self._running = 0

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """ResourceExhausted where all are taken."""
        if self._running >= SIGN_INS_LIMIT:
            raise ResourceExhausted("many people sign in at the moment; try again", retry_after_s=2.0)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def _has_body(request: Request) -> bool:
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


class KeyRoutes:
    def __init__(self, gateway: Gateway, options: HttpOptions, verifier: PersonVerifier | None) -> None:
        """`verifier`: of people's tokens; None where no issuer is trusted for people."""
        self._gateway, self._options, self._verifier = gateway, options, verifier
        # Strangers may send these, so they are small and soon there.
        self._small = replace(options, json_limit_bytes=SMALL_BODY_BYTES, body_idle_s=SMALL_BODY_IDLE_S)
        self._sign_ins = SignIns()

    def router(self) -> APIRouter:
        router = APIRouter(tags=["keys"], dependencies=[Depends(refuse_unknown)])
        add = router.add_api_route
        one = "/v1/keys/{key_id}"
        add("/v1/keys", self.create, methods=["POST"], **docs.CREATE_KEY)
        add("/v1/keys", self.list, methods=["GET"], **docs.LIST_KEYS)
        add(f"{one}:rotate", self.rotate, methods=["POST"], **docs.ROTATE_KEY)
        add(f"{one}:revoke", self.revoke, methods=["POST"], **docs.REVOKE_KEY)
        add(one, self.get, methods=["GET"], **docs.GET_KEY)
        add("/v1/session", self.open_session, methods=["POST"], **docs.OPEN_SESSION)
        add("/v1/session", self.close_session, methods=["DELETE"], **docs.CLOSE_SESSION)
        return router

    async def create(self, request: Request, caller: Manager) -> Response:
        message = keys_pb2.CreateKeyRequest()
        fill(message, await read_json(request, self._options))
        made = await self._gateway.keys.create(
            caller,
            tenant=wire.tenant(message.tenant),
            role=wire.role(message.role),
            note=wire.note(message.note),
            ttl_s=wire.ttl_s(message.ttl_s),
        )
        return self._created(made)

    async def list(
        self,
        caller: Manager,
        tenant: Annotated[str, Query(description="Empty: all that you manage.")] = "",
        with_ended: Annotated[bool, Query(description="Those that have ended, too.")] = False,
        page_size: Annotated[int, Query(ge=0, le=wire.PAGE_SIZE_LIMIT, description=f"0 means {wire.PAGE_SIZE}.")] = 0,
        page_token: Annotated[str, Query(description="`next_page_token` of the page before.")] = "",
    ) -> Response:
        size = page_size or wire.PAGE_SIZE
        found = self._gateway.keys.page(
            caller, tenant=wire.tenant(tenant), with_ended=with_ended, before=page_token, limit=size
        )
        return answer(wire.page(found, size, now_s=self._gateway.now_s()))

    async def get(self, key_id: str, caller: Manager) -> Response:
        return answer(wire.key(self._gateway.keys.get(caller, key_id), now_s=self._gateway.now_s()))

    async def rotate(self, request: Request, key_id: str, caller: Manager) -> Response:
        message = keys_pb2.RotateKeyRequest()
        if _has_body(request):
            fill(message, await read_json(request, self._small))
        made = await self._gateway.keys.rotate(caller, key_id, overlap_s=wire.overlap_s(message))
        return self._created(made)

    async def revoke(self, key_id: str, caller: Manager) -> Response:
        return answer(wire.key(await self._gateway.keys.revoke(caller, key_id), now_s=self._gateway.now_s()))

    async def open_session(self, request: Request) -> Response:
        """Needs no right: the proof is the token of the request, or the one in its body."""
        with self._sign_ins.taken():
            made = await self._opened(request)
        response = answer(wire.key(made.key, now_s=self._gateway.now_s()), status=201)
        response.set_cookie(
            COOKIE,
            made.secret,
            max_age=max(1, int(made.key.expire_s - self._gateway.now_s())),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    async def _opened(self, request: Request) -> CreatedKey:
        message = keys_pb2.OpenSessionRequest()
        if _has_body(request):
            fill(message, await read_json(request, self._small))
        keys = self._gateway.keys
        if not message.jwt:
            return await keys.open_session(require_proof(request.state.caller), request.state.token)
        if self._verifier is None:
            raise Unauthenticated("this gateway trusts no issuer for people: add [[people]] to its issuers' file")
        return await keys.open_session_of(await self._verifier.verify_person(message.jwt))

    async def close_session(self, request: Request) -> Response:
        await self._gateway.keys.close_session(require_proof(request.state.caller))
        response = answer(keys_pb2.OpenSessionRequest())
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    def _created(self, made: CreatedKey) -> Response:
        response = answer(wire.created(made, now_s=self._gateway.now_s()), status=201)
        response.headers["Cache-Control"] = "no-store"
        return response
