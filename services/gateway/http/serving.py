"""Where HTTP listens, TLS, and uvicorn's server over our own connections.

It prints nothing and handles no signal; it stops when its event is set.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from services.gateway.http.connections import (
    Connection,
    ConnectionLimits,
    Connections,
    HttpProtocol,
    Listener,
    proves_by_tls,
    quiet_uvicorn,
)
from services.kernel.config import CommonSettings, SettingsError
from services.kernel.grpc_server import expand_address, split_address

# What a request line and headers may take together.
HEADER_LIMIT_BYTES = 64 * 1024
KEEP_ALIVE_S = 75
BACKLOG = 1_024


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._connections = Connections(limits)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with our own listeners; uvicorn's other start does not concern an application without lifespan."""
        await self.lifespan.startup()
        self.servers = [
            Listener(each, self._connections, self.config.ssl, self._protocol)  # type: ignore[misc]
            for each in sockets or ()
        ]
        self.started = True

    def _protocol(self, connection: Connection) -> HttpProtocol:
        return HttpProtocol(
            connection,
            self._connections,
            proves_by_tls=proves_by_tls(self.config),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )

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


async def serve_http(
    app: ASGIApp,
    sockets: list[socket.socket],
    stop: asyncio.Event,
    settings: CommonSettings,
    limits: ConnectionLimits | None = None,
) -> None:
    """Serve until `stop`, then let running requests end within the drain grace."""
    quiet_uvicorn()
    server = _Server(_config(app, settings), limits or ConnectionLimits())
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
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_grace_s),
        h11_max_incomplete_event_size=HEADER_LIMIT_BYTES,
        ssl_certfile=settings.tls_cert_file,
        ssl_keyfile=settings.tls_key_file,
        ssl_ca_certs=str(settings.tls_client_ca_file) if settings.tls_client_ca_file else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca_file else ssl.CERT_NONE,
    )
