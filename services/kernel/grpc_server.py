"""A gRPC server: where it listens, TLS, health, reflection and limits. Knows no service."""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fanlight.channel import MAX_MESSAGE_BYTES, channel_options
from services.kernel.config import CommonSettings, SettingsError
from services.kernel.grpc_admission import (
    Accepts,
    Admit,
    CallAdmission,
    CallLimits,
    DrainInterceptor,
    TokenInterceptor,
    accepts_none,
    admit_all,
)
from services.kernel.grpc_connections import GrpcConnections, connections_limit
from services.kernel.grpc_guards import NO_LIMITS, ErrorInterceptor
from services.kernel.health import GetState, HealthService, always_ready

# A client may ping this often while it waits; home routers need it, gRPC's own default is five minutes.
MIN_PING_INTERVAL_MS = 5_000
# How long a connection may take for TLS and HTTP/2, and then stay without a call.
HANDSHAKE_MS = 10_000
CONNECTION_IDLE_MS = 300_000
PENDING_CALLS = 20_000


class RpcServer:
    """Create it with its services, `bind` it, `start` it, `stop` it."""

    def __init__(
        self,
        settings: CommonSettings,
        *,
        services: Mapping[str, Callable[[grpc.aio.Server], None]],
        tokens: Mapping[str, tuple[str, ...]],
        default_tokens: tuple[str, ...],
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        message_limits: Mapping[str, int] = NO_LIMITS,
        places: Mapping[str, int] | None = None,
        limits: CallLimits | None = None,
        get_health: GetState = always_ready,
        accepts: Accepts = accepts_none,
        admit: Admit = admit_all,
    ) -> None:
        """`services`: by full service name, the function that adds its servicer; without any, it serves health alone.

        `tokens`: by full service name, the tokens it accepts; `default_tokens` for the others; `accepts`: whether it
        accepts another token; `admit`: is called before each call that has a right token.
        `message_limits`: by full service name, a lower limit of its requests' bytes than `max_message_bytes`.
        `places`: by full method, how many of its calls may run at a time, apart from all others.
        """
        self._settings = settings
        known = {token for each in (*tokens.values(), default_tokens) for token in each}
        self._connections = GrpcConnections()
        admission = CallAdmission(limits=limits, places=places, tokens=known, on_proof=self._connections.prove)
        self._sweeping: asyncio.Task[None] | None = None
        self._draining = DrainInterceptor()
        self._server = grpc.aio.server(
            interceptors=[
                TokenInterceptor(tokens, default=default_tokens, accepts=accepts, admit=admit),
                self._draining,
                ErrorInterceptor(admission, message_limits),
            ],
            options=_server_options(max_message_bytes),
            maximum_concurrent_rpcs=admission.limit,
        )
        self.health = HealthService(list(services), get_health)
        self._looking: asyncio.Task[None] | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        for add in services.values():
            add(self._server)
        if services:
            reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    def bind(self, address: str) -> int:
        """Listen there and return the port, which the system chooses for port 0. SettingsError if it is taken."""
        ports = [self._bind_one(each) for each in expand_address(address)]
        self._connections.listen_on(ports[0])
        return ports[0]

    def _bind_one(self, address: str) -> int:
        try:
            credentials = _credentials(self._settings)
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise SettingsError(f"cannot listen on {address}: the port is taken or the address is not ours")
        return port

    async def start(self) -> None:
        await self._server.start()
        self._sweeping = asyncio.get_running_loop().create_task(self._connections.run())
        self._looking = asyncio.create_task(self.health.run(), name="health")

    async def set_serving(self, is_serving: bool) -> None:
        """From now on the health service reports the state; before, that the server is starting."""
        await self.health.open(is_serving)

    async def drain(self) -> None:
        """Refuse new calls, except health, and let the running ones go on."""
        self._draining.is_on = True
        await self.health.drain()

    async def stop(self, *, grace_s: float | None = None) -> None:
        """Accept no new calls, let the running ones finish within the grace period, then cancel them.

        `grace_s`: in place of the setting.
        """
        await self.health.close()
        await self._server.stop(self._settings.drain_grace_s if grace_s is None else grace_s)
        if self._looking is not None:
            self._looking.cancel()
        if self._sweeping is not None:
            self._sweeping.cancel()


def _server_options(max_message_bytes: int) -> Sequence[tuple[str, int]]:
    return [
        *channel_options(max_message_bytes=max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS),
        ("grpc.max_allowed_incoming_connections", connections_limit()),
        # gRPC itself would refuse calls at random above 1,000 that wait to be looked at, whoever made them.
        ("grpc.server.max_pending_requests", PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),
    ]


def _credentials(settings: CommonSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    require_pair(settings.tls_cert_file, settings.tls_key_file)
    roots = settings.tls_client_ca_file.read_bytes() if settings.tls_client_ca_file else None
    pair = (settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def require_pair(cert_file: Path, key_file: Path) -> None:
    """SettingsError for a bad pair, which gRPC would report only in its own log."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file)
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(f"{cert_file} and {key_file} are not a PEM certificate chain and its key") from error


def split_address(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port of HOST:PORT."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    return host == "localhost" or is_loopback_ip(host)


def is_loopback_ip(host: str) -> bool:
    """Also of an IPv4 address that came in over IPv6; False for what is no IP address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def require_tokens(address: str, tokens: dict[str, str]) -> None:
    """SettingsError if anyone could call: not on loopback, and without the named tokens."""
    missing = [name for name, token in tokens.items() if not token]
    if missing and not is_loopback(address):
        raise SettingsError(f"{address} is not loopback: set {' and '.join(missing)} (or a _FILE of each)")


def expand_address(address: str) -> list[str]:
    """The addresses to bind: `localhost` is both loopback addresses if the machine has them."""
    host, port = split_address(address)
    if host != "localhost":
        return [address]
    return [f"127.0.0.1:{port}"] + ([f"[::1]:{port}"] if port and _has_ipv6() else [])


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def address_of(address: str, port: int) -> str:
    """The bound address with the port that `bind` returned."""
    host, _ = split_address(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
