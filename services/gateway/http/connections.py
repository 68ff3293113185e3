"""The connections of HTTP: accepted, given a deadline for each request's head, limited while they prove no credential.

uvicorn's own limit counts all connections alike, so a stranger's idle ones would stop everybody. Knows no request.
"""

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.gateway.app.peer_roles import auth_context_of
from services.kernel.logs import get_logger
from services.kernel.unproven import Unproven

log = get_logger()

# The key in a request's state of the function that counts its connection as one with a proved credential.
PROVE = "prove_connection"
# The key in a request's state of its connection's certificate, as `peer_roles` reads it.
AUTH_CONTEXT = "auth_context"
# A shortage of open files is tried again after this.
ACCEPT_RETRY_S = 0.1
GIVE_WAY = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    # How long a TLS handshake may take, and then, or after a first byte, the head of a request.
    handshake_s: float = 10.0
    head_s: float = 10.0
    # Connections that have proved no credential: of one address, and in all.
    unproven_per_address: int = 512
    unproven: int = 2_048
    # Connections that have; above it, one that waits for its next request is closed.
    proven: int = 4_000


class Connection:
    """One accepted connection, from before its TLS handshake to its end."""

    def __init__(self, accepted: socket.socket) -> None:
        self._accepted = accepted
        self.protocol: HttpProtocol | None = None

    def end(self) -> None:
        """At once, without sending what is not sent yet."""
        if self.protocol is not None and self.protocol.transport is not None:
            self.protocol.transport.abort()
        else:
            with contextlib.suppress(OSError):
                self._accepted.shutdown(socket.SHUT_RDWR)


class Connections:
    """All connections of the server. Those that give way to new ones are ended here."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._unproven: Unproven[Connection] = Unproven(
            limit=limits.unproven, limit_per_address=limits.unproven_per_address
        )
        # The one that was used longest ago comes first.
        self._proven: OrderedDict[Connection, None] = OrderedDict()

    def add(self, connection: Connection, address: str) -> None:
        for old in self._unproven.add(connection, address):
            old.end()

    def prove(self, connection: Connection) -> None:
        """It sent a request with a credential."""
        if connection in self._proven:
            self._proven.move_to_end(connection)
            return
        self._unproven.remove(connection)
        self._proven[connection] = None
        if len(self._proven) > self.limits.proven:
            self._end_an_idle_one()

    def _end_an_idle_one(self) -> None:
        for each in self._proven:
            if each.protocol is not None and each.protocol.is_idle:
                del self._proven[each]
                each.end()
                return

    def remove(self, connection: Connection) -> None:
        self._unproven.remove(connection)
        self._proven.pop(connection, None)

    def give_way(self) -> None:
        """End some unproven connections, not the newest: the process has no open file left for a new one."""
        for each in self._unproven.oldest(min(GIVE_WAY, len(self._unproven) // 2)):
            self._unproven.remove(each)
            each.end()


class HttpProtocol(H11Protocol):
    """uvicorn's, with a deadline for each head, and refusals in the shape of our errors."""

    def __init__(
        self, connection: Connection, connections: Connections, *, proves_by_tls: bool, **uvicorns: Any
    ) -> None:
        super().__init__(**uvicorns)
        self._connection = connection
        self._connections = connections
        self._proves_by_tls = proves_by_tls
        self._head_timer: asyncio.TimerHandle | None = None
        self.app_state = {**self.app_state, PROVE: self._prove}
        connection.protocol = self

    def _prove(self) -> None:
        self._connections.prove(self._connection)

    @property
    def is_idle(self) -> bool:
        """It waits for the next request."""
        return bool(self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn itself does
        super().connection_made(transport)
        if self._proves_by_tls:
            self._prove()
            shown = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
            self.app_state[AUTH_CONTEXT] = auth_context_of(shown)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._connections.remove(self._connection)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self.is_idle and not self.transport.is_closing():
            # Bytes of a head that is not complete. A timer that runs goes on: dripping does not extend it.
            if self._head_timer is None:
                self._start_head_timer()
        else:
            self._stop_head_timer()

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._connections.limits.head_s, self._on_late_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_late_head(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            message = f"the head of the request did not arrive within {self._connections.limits.head_s:g} s"
            self._refuse(408, "DEADLINE_EXCEEDED", message)
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "INVALID_FIELD", "this is not an HTTP/1.1 request that can be read")

    def _refuse(self, status: int, reason: str, message: str) -> None:
        """Answer where no answer has begun, and close."""
        body = json.dumps({"error": {"reason": reason, "message": message}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


class Listener:
    """Accepts the connections of one listening socket; in the place of asyncio's server in uvicorn's."""

    def __init__(
        self,
        listening: socket.socket,
        connections: Connections,
        tls: ssl.SSLContext | None,
        make: Callable[[Connection], HttpProtocol],
    ) -> None:
        """`make`: the protocol of a connection."""
        self._listening = listening
        self._connections = connections
        self._tls = tls
        self._make = make
        self._opening: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(self._listening)
            except OSError as error:
                log.warning("accept_failed", error=error.strerror or str(error))
                self._connections.give_way()
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            connection = Connection(accepted)
            self._connections.add(connection, address[0])
            opening = loop.create_task(self._open(connection, accepted))
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)
            # Others come in between, also while many connections wait to be accepted.
            await asyncio.sleep(0)

    async def _open(self, connection: Connection, accepted: socket.socket) -> None:
        limit_s = self._connections.limits.handshake_s if self._tls else None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._make(connection), accepted, ssl=self._tls, ssl_handshake_timeout=limit_s
            )
        except OSError as error:
            # A handshake that failed or was late; a client that is gone.
            log.debug("connection_failed", error=str(error))
            self._connections.remove(connection)
            accepted.close()

    def close(self) -> None:
        self._accepting.cancel()
        for opening in self._opening:
            opening.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._opening, return_exceptions=True)


def quiet_uvicorn() -> None:
    """It logs a line for each request that is not HTTP, as many as a stranger likes."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def proves_by_tls(config: Config) -> bool:
    """Every client has shown a certificate that the settings trust."""
    return config.is_ssl and config.ssl_cert_reqs == ssl.CERT_REQUIRED
