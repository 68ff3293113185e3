"""The HTTP application: guards before every request, and the routes put together."""

import asyncio
import contextlib

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fanlight.errors import FanlightError, ResourceExhausted
from services.gateway.app.gateway import Gateway
from services.gateway.app.keys import PersonVerifier
from services.gateway.app.quotas import Quotas
from services.gateway.http import docs, errors
from services.gateway.http.admin import DeadLetterRoutes, HealthRoutes, ListingRoutes, MetricRoutes
from services.gateway.http.annotate import AnnotateRoutes
from services.gateway.http.audit_log import AuditLogRoutes
from services.gateway.http.blobs import BlobRoutes
from services.gateway.http.bodies import HttpOptions
from services.gateway.http.credentials import SESSION_PATH, TokenGuard
from services.gateway.http.hosts import HostGuard
from services.gateway.http.jobs import EventRoutes, JobRoutes
from services.gateway.http.keys import KeyRoutes
from services.gateway.http.nodes import NodeRoutes
from services.gateway.http.openapi import describe
from services.gateway.http.records import RecordRoutes
from services.gateway.http.tenants import TenantRoutes
from services.kernel.blobs import BlobStore

LINGER_LIMIT_BYTES = 256 * 1024 * 1024
LINGER_LIMIT_S = 30.0

# For machines that have no token.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
# They answer at once, also when all else waits; signing in has places of its own.
UNLIMITED_PATHS = OPEN_PATHS | {"/metrics", SESSION_PATH}
BUSY_RETRY_AFTER_S = 2.0


class RateGuard:
    """429 for callers whose tenant has sent too many requests of late."""

    def __init__(self, app: ASGIApp, quotas: Quotas, open_paths: frozenset[str]) -> None:
        self._app, self._quotas, self._open_paths = app, quotas, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = scope["state"].get("caller")
        if caller is not None and scope["path"] not in self._open_paths:
            try:
                await self._quotas.take_request(caller)
            except FanlightError as error:
                await errors.answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequestLimit:
    """Limits the requests at a time, waiting ones and streams included; 429 above."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in UNLIMITED_PATHS:
            await self._app(scope, receive, send)
            return
        if self._running >= self._limit:
            await errors.answer(self._busy())(scope, receive, send)
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


class LingeringClose:
    """Answers a request before its body has all come, and discards the rest before the connection is closed.

    Most clients send the whole body before they read the answer, and closing at once would reset the connection under
    them.
    """

    def __init__(self, app: ASGIApp, idle_s: float) -> None:
        """`idle_s`: how long the rest of a body may stop coming before the connection is closed."""
        self._app = app
        self._idle_s = idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        # A client that sent `Expect`, and got no 100 Continue, sends no body after such an answer.
        asks = "expect" in headers
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def watched_receive() -> Message:
            nonlocal asks, unread
            asks = False
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                unread = False
            return message

        async def watched_send(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif unread and not asks and not message.get("more_body"):
                await send({**message, "more_body": True})
                await self._discard(receive)
                message = {"type": "http.response.body"}
            await send(message)

        await self._app(scope, watched_receive, watched_send)

    async def _discard(self, receive: Receive) -> None:
        """Until the body or the connection ends, or a limit is reached."""
        size_bytes, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_LIMIT_S):
                while more and size_bytes < LINGER_LIMIT_BYTES:
                    async with asyncio.timeout(self._idle_s):
                        message = await receive()
                    size_bytes += len(message.get("body", b""))
                    more = message.get("more_body", False)


def http_app(gateway: Gateway, blobs: BlobStore, options: HttpOptions, people: PersonVerifier | None = None) -> FastAPI:
    """`people`: verifies people's tokens; None where no issuer is trusted for people."""
    app = FastAPI(
        title="Fanlight",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(LingeringClose, idle_s=options.linger_idle_s),
            Middleware(errors.ErrorGuard),
            Middleware(HostGuard, names=options.host_names, open_paths=OPEN_PATHS),
            Middleware(TokenGuard, callers=options.callers, open_paths=OPEN_PATHS),
            Middleware(RateGuard, quotas=gateway.quotas, open_paths=UNLIMITED_PATHS),
            Middleware(RequestLimit, limit=options.requests_limit),
        ],
    )
    errors.install(app)
    for routes in (
        JobRoutes(gateway, blobs, options),
        EventRoutes(gateway, options),
        BlobRoutes(gateway, blobs, options),
        AnnotateRoutes(gateway, blobs, options),
        ListingRoutes(gateway),
        DeadLetterRoutes(gateway),
        NodeRoutes(gateway),
        RecordRoutes(gateway),
        KeyRoutes(gateway, options, people),
        TenantRoutes(gateway, options),
        AuditLogRoutes(gateway, options),
        MetricRoutes(gateway),
        HealthRoutes(gateway),
    ):
        app.include_router(_with_heads(routes.router()))
    describe(app)
    docs.install(app)
    return app


def _with_heads(router: APIRouter) -> APIRouter:
    """HEAD wherever GET is, with the same rights; the server leaves out the body."""
    routes = [(route, route.methods or ()) for route in router.routes if isinstance(route, APIRoute)]
    answered = {route.path for route, methods in routes if "HEAD" in methods}
    for route, methods in routes:
        if "GET" in methods and route.path not in answered:
            router.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                # Those of the router are added to every route.
                dependencies=[each for each in route.dependencies if each not in router.dependencies],
                response_class=Response,
                response_model=None,
                include_in_schema=False,
            )
    return router
