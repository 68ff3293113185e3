"""Where an HTTP request carries its token or key: one place, of those that clients know."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fanlight.contract.audit_log import Actor
from fanlight.errors import FanlightError, PermissionDenied, Unauthenticated
from services.gateway.app.audit_log import act_as, acting
from services.gateway.app.peer_roles import Role, require_role
from services.gateway.app.tenants import Callers, token_of
from services.gateway.http import errors
from services.gateway.http.connections import AUTH_CONTEXT, PROVE

COOKIE = "fanlight_session"
AUTHORIZATION = "authorization"
# Each has the token as it is.
KEY_HEADERS = ("x-api-key", "salad-api-key", "apikey")
# Methods that change nothing, which pages of other sites may send.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Paths whose body may be the proof.
SESSION_PATH = "/v1/session"


class TokenGuard:
    """401 for requests whose token is unknown; handlers find the caller and the token in the request's state.

    403 for a certificate that is not a client's or an operator's, whatever the token. A known token takes the
    connection out of those that are limited by address.
    """

    def __init__(self, app: ASGIApp, callers: Callers, open_paths: frozenset[str]) -> None:
        self._app, self._callers, self._open_paths = app, callers, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        token, refusal = _sent_token(headers)
        caller = None if refusal else self._callers.of_token(token)
        state = scope.setdefault("state", {})
        refusal = refusal or _wrong_role(state.get(AUTH_CONTEXT, {}))
        if caller is not None and _is_foreign(scope, headers):
            refusal = PermissionDenied("a page of another site sent this request; only this gateway's own pages may")
        prove: Callable[[], None] | None = state.get(PROVE)
        if caller is not None and prove is not None:
            prove()
        takes_proof = scope["path"] == SESSION_PATH and scope["method"] == "POST"
        if (refusal is None and (caller is not None or takes_proof)) or scope["path"] in self._open_paths:
            state["caller"], state["token"] = caller, token
            address = str((scope.get("client") or ("",))[0])
            acting.set(Actor(address=address))
            if caller is not None:
                act_as(caller, address)
            if caller is not None and scope["method"] == "GET":
                held = _HeldStream(receive, send, lambda: self._callers.of_token(token) is not None)
                receive, send = held.receive, held.send
            await self._app(scope, receive, send)
        else:
            error = refusal or Unauthenticated("send the right token as `Authorization: Bearer TOKEN`")
            await errors.answer(error)(scope, receive, send)


class _HeldStream:
    """An answer without a known length, which may go on for hours: it ends as soon as its token is not valid any more.

    The client sees an answer that has ended; its next request is refused.
    """

    def __init__(self, receive: Receive, send: Send, is_valid: Callable[[], bool]) -> None:
        self._receive, self._send, self._is_valid = receive, send, is_valid
        self._is_stream = False
        self._ended = asyncio.Event()

    async def send(self, message: Message) -> None:
        if self._ended.is_set():
            raise ClientDisconnect
        if message["type"] == "http.response.start":
            self._is_stream = all(name.lower() != b"content-length" for name, _ in message["headers"])
        elif self._is_stream and not self._is_valid():
            self._ended.set()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def receive(self) -> Message:
        """A disconnect once the stream has ended, so that who produces it stops."""
        tasks = {asyncio.ensure_future(self._receive()), asyncio.create_task(self._wait())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        return done.pop().result()

    async def _wait(self) -> Message:
        await self._ended.wait()
        return {"type": "http.disconnect"}


def _wrong_role(auth_context: Mapping[str, Iterable[bytes]]) -> FanlightError | None:
    try:
        require_role(auth_context, Role.CLIENT, Role.OPERATOR)
    except PermissionDenied as error:
        return error
    return None


def _sent_token(headers: Headers) -> tuple[str, FanlightError | None]:
    """The token, and the refusal of a request that has several. A cookie counts where there is nothing else."""
    sent = [token_of(value) for value in headers.getlist(AUTHORIZATION)]
    if len(sent) > 1:
        return "", Unauthenticated(f"send one `Authorization` header; this request has {len(sent)}")
    sent += [value.strip() for name in KEY_HEADERS for value in headers.getlist(name)]
    if not sent:
        return _cookie(headers), None
    if len(set(sent)) > 1:
        return "", Unauthenticated("send one token; this request has several that differ")
    return sent[0], None


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _is_foreign(scope: Scope, headers: Headers) -> bool:
    """A change that another site's page sent along with our cookie."""
    if scope["method"] in SAFE_METHODS or any(name in headers for name in (AUTHORIZATION, *KEY_HEADERS)):
        return False
    if COOKIE not in headers.get("cookie", ""):
        return False
    site = headers.get("sec-fetch-site", "")
    if site:
        return site not in ("same-origin", "none")
    origin = headers.get("origin", "")
    return bool(origin) and origin.partition("://")[2] != headers.get("host", "")
