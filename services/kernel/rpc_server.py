"""A gRPC server of ours: health, reflection, limits, keepalive and tokens."""

import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fanlight.channel import channel_options
from services.kernel.config import CommonSettings, SettingsError
from services.kernel.listen import expand, split
from services.kernel.logs import get_logger
from services.kernel.rpc_guard import ErrorInterceptor, TokenInterceptor

log = get_logger()

# A client may ping this often while it waits; home routers need it, gRPC's own default is five minutes.
MIN_PING_INTERVAL_MS = 5_000
MAX_CONCURRENT_RPCS = 2_000


class RpcServer:
    """Built with its services, then `start`ed, then `stop`ped."""

    def __init__(
        self,
        settings: CommonSettings,
        *,
        services: Mapping[str, Callable[[grpc.aio.Server], None]],
        tokens: Mapping[str, tuple[str, ...]],
        default_tokens: tuple[str, ...],
    ) -> None:
        """`services`: full service name to what adds its servicer; `tokens`: which tokens each takes."""
        self._settings = settings
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(), TokenInterceptor(tokens, default=default_tokens)],
            options=_server_options(settings),
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for add in services.values():
            add(self._server)
        self._names = ["", *services]
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    def bind(self, address: str) -> int:
        """Listen there; the port, which the system chose where 0 was asked for. SettingsError if it is taken."""
        ports = [self._bind_one(each) for each in expand(address)]
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

    async def set_serving(self, serving: bool) -> None:
        """What health answers for every service and for the whole."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self) -> None:
        """Take no new calls, let the running ones finish within the grace, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._settings.drain_grace_s)


def _server_options(settings: CommonSettings) -> Sequence[tuple[str, int]]:
    return [
        *channel_options(max_message_bytes=settings.max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.so_reuseport", 0),
    ]


def _credentials(settings: CommonSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    _require_pair(settings.tls_cert_file, settings.tls_key_file)
    roots = settings.tls_client_ca_file.read_bytes() if settings.tls_client_ca_file else None
    pair = (settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def _require_pair(cert_file: Path, key_file: Path) -> None:
    """SettingsError for what gRPC would only say in its own log, after a port that nobody took."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file)
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(f"{cert_file} and {key_file} are no PEM certificate chain with its key") from error


def address_of(address: str, port: int) -> str:
    """The bound address, with the port that the system chose."""
    host, _ = split(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
