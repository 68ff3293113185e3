"""What stands before every request: who may call, and how many at a time."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fanlight.errors import FanlightError, ResourceExhausted, Unauthenticated
from services.gateway.app.callers import Callers
from services.gateway.http.errors import answer

# Asked by machines that hold no token.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
BUSY_RETRY_AFTER_S = 2.0


class TokenGuard:
    """401 for requests whose token is nobody's; tells the others' handlers who calls."""

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        self._app = app
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = self._callers.of_authorization(Headers(scope=scope).get("authorization", ""))
        if caller is not None or scope["path"] in OPEN_PATHS:
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, receive, send)
        else:
            error = Unauthenticated("send the right token as `Authorization: Bearer TOKEN`")
            await answer(error)(scope, receive, send)


class RequestLimit:
    """At most so many requests at a time, waiting ones and streams included; 429 above."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if self._running >= self._limit:
            await answer(self._busy())(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1

    def _busy(self) -> FanlightError:
        return ResourceExhausted(
            f"{self._limit} requests are being answered already; try again later", retry_after_s=BUSY_RETRY_AFTER_S
        )
