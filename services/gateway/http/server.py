"""Where the HTTP application is served. Prints nothing, handles no signal; stops when it is told to."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from services.kernel.config import CommonSettings, SettingsError
from services.kernel.listen import expand, split

# What a request line and headers may take together.
HEADER_LIMIT_BYTES = 64 * 1024
KEEP_ALIVE_S = 75
BACKLOG = 1_024
# Above it uvicorn answers 503 by itself; the application's own limit comes first.
CONNECTIONS_LIMIT = 4_000


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business."""
        yield


def bind_http(address: str) -> list[socket.socket]:
    """Listening sockets for HOST:PORT; `[::]` takes IPv4 as well. SettingsError if the port is taken."""
    sockets: list[socket.socket] = []
    try:
        for each in expand(address):
            sockets.append(_bound(*split(each)))
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
