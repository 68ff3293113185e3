"""The HTTP application: guards before every request, the routes put together, and the server that serves them.

It prints nothing and handles no signal; it stops when its event is set.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fanlight.errors import FanlightError, ResourceExhausted, Unauthenticated
from services.gateway.app.gateway import Gateway
from services.gateway.app.tenants import Callers
from services.gateway.http import docs, errors
from services.gateway.http.admin import DeadLetterRoutes, HealthRoutes, ListingRoutes, MetricRoutes
from services.gateway.http.annotate import AnnotateRoutes
from services.gateway.http.blobs import BlobRoutes
from services.gateway.http.bodies import HttpOptions
from services.gateway.http.jobs import EventRoutes, JobRoutes
from services.gateway.http.openapi import describe
from services.gateway.http.records import RecordRoutes
from services.kernel.blobs import BlobStore
from services.kernel.config import CommonSettings, SettingsError
from services.kernel.grpc_server import expand_address, split_address

LINGER_LIMIT_BYTES = 256 * 1024 * 1024
LINGER_LIMIT_S = 30.0
# What a request line and headers may take together.
HEADER_LIMIT_BYTES = 64 * 1024
KEEP_ALIVE_S = 75
BACKLOG = 1_024
# Above it uvicorn answers 503 by itself; the application's own limit comes first.
CONNECTIONS_LIMIT = 4_000

# For machines that have no token.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
BUSY_RETRY_AFTER_S = 2.0


class TokenGuard:
    """401 for requests whose token is unknown; handlers find the caller in the request's state."""

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
            await errors.answer(error)(scope, receive, send)


class RequestLimit:
    """Limits the requests at a time, waiting ones and streams included; 429 above."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS:
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


def http_app(gateway: Gateway, blobs: BlobStore, options: HttpOptions) -> FastAPI:
    app = FastAPI(
        title="Fanlight",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(LingeringClose, idle_s=options.linger_idle_s),
            Middleware(errors.ErrorGuard),
            Middleware(TokenGuard, callers=options.callers),
            Middleware(RequestLimit, limit=options.requests_limit),
        ],
    )
    errors.install(app)
    for routes in (
        JobRoutes(gateway, blobs, options),
        EventRoutes(gateway, options),
        BlobRoutes(blobs, options),
        AnnotateRoutes(gateway, blobs, options),
        ListingRoutes(gateway),
        DeadLetterRoutes(gateway),
        RecordRoutes(gateway),
        MetricRoutes(gateway),
        HealthRoutes(gateway),
    ):
        app.include_router(routes.router())
    describe(app)
    docs.install(app)
    return app


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process handles signals itself."""
        yield


def bind_http(address: str) -> list[socket.socket]:
    """Listening sockets for HOST:PORT; `[::]` takes IPv4 as well. SettingsError if the port is taken."""
    sockets: list[socket.socket] = []
    try:
        for each in expand_address(address):
            sockets.append(_bound(*split_address(each)))
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise SettingsError(f"cannot listen on {address}: {error.strerror or error}") from error
    return sockets


def port_of(sockets: Sequence[socket.socket]) -> int:
    port: int = sockets[0].getsockname()[1]
    return port


def _bound(host: str, port: int) -> socket.socket:
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        listening.bind(target)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


async def serve_http(app: ASGIApp, sockets: list[socket.socket], stop: asyncio.Event, settings: CommonSettings) -> None:
    """Serve until `stop`, then let running requests end within the drain grace."""
    server = _Server(_config(app, settings))
    async with asyncio.TaskGroup() as group:
        stopping = group.create_task(_stop(server, stop))
        await server.serve(sockets=sockets)
        stopping.cancel()


async def _stop(server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


def _config(app: ASGIApp, settings: CommonSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS_LIMIT,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_grace_s),
        h11_max_incomplete_event_size=HEADER_LIMIT_BYTES,
        ssl_certfile=settings.tls_cert_file,
        ssl_keyfile=settings.tls_key_file,
        ssl_ca_certs=str(settings.tls_client_ca_file) if settings.tls_client_ca_file else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca_file else ssl.CERT_NONE,
    )
