"""A gRPC server: where it listens, TLS, health, reflection and limits; who may call; how errors leave it.

A client never sees a traceback. Knows no service.
"""

import asyncio
import hmac
import ipaddress
import socket
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from fanlight.channel import MAX_MESSAGE_BYTES, channel_options
from fanlight.contract.finite import refuse_at_edge
from fanlight.errors import FanlightError, InvalidField, Unauthenticated, Unavailable
from services.kernel.config import CommonSettings, SettingsError
from services.kernel.errors_wire import find_broken_string, to_status
from services.kernel.health import GetState, HealthService, always_ready
from services.kernel.logs import get_logger

log = get_logger()

# A client may ping this often while it waits; home routers need it, gRPC's own default is five minutes.
MIN_PING_INTERVAL_MS = 5_000
MAX_CONCURRENT_RPCS = 2_000
OPEN_SERVICES = frozenset({"grpc.health.v1.Health"})

T = TypeVar("T")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# Returns None if no handler has the method.
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


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
        get_health: GetState = always_ready,
    ) -> None:
        """`services`: by full service name, the function that adds its servicer; without any, it serves health alone.

        `tokens`: by full service name, the tokens it accepts; `default_tokens` for the others.
        """
        self._settings = settings
        self._draining = DrainInterceptor()
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(), TokenInterceptor(tokens, default=default_tokens), self._draining],
            options=_server_options(max_message_bytes),
            maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS,
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


def _server_options(max_message_bytes: int) -> Sequence[tuple[str, int]]:
    return [
        *channel_options(max_message_bytes=max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.so_reuseport", 0),
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
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_tokens(address: str, tokens: dict[str, str], *, mutual_tls: bool) -> None:
    """SettingsError if anyone could call: not on loopback, and without the named tokens or mutual TLS."""
    missing = [name for name, token in tokens.items() if not token]
    if missing and not mutual_tls and not is_loopback(address):
        raise SettingsError(
            f"{address} is not loopback: set {' and '.join(missing)} (or a _FILE of each), or mutual TLS"
        )


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


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """UNAUTHENTICATED for calls without a token that the called service accepts. Health needs no token."""

    def __init__(self, tokens: Mapping[str, tuple[str, ...]], *, default: tuple[str, ...]) -> None:
        """`tokens`: by full service name, the tokens it accepts; `default` for the others. Empty: no token needed."""
        self._tokens = tokens
        self._default = default

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        service = handler_call_details.method.split("/")[1]
        accepted = self._tokens.get(service, self._default)
        if handler is None or not accepted or service in OPEN_SERVICES or _has_token(handler_call_details, accepted):
            return handler
        return _guarded_by(handler, _refuse)


class DrainInterceptor(grpc.aio.ServerInterceptor):
    """UNAVAILABLE for new calls while `is_on`, except health."""

    def __init__(self) -> None:
        self.is_on = False

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None or not self.is_on or handler_call_details.method.split("/")[1] in OPEN_SERVICES:
            return handler
        return _guarded_by(handler, _refuse_while_draining)


async def _refuse_while_draining(
    call: Callable[[], Awaitable[Any]], context: grpc.aio.ServicerContext[Any, Any]
) -> Any:
    raise Unavailable("is stopping: call another server, or this one again later")


def _has_token(details: grpc.HandlerCallDetails, accepted: tuple[str, ...]) -> bool:
    sent = dict(details.invocation_metadata or ()).get("authorization", "")
    kind, _, token = (sent if isinstance(sent, str) else "").partition(" ")
    if kind.lower() != "bearer":
        return False
    return any(hmac.compare_digest(token.encode(), each.encode()) for each in accepted)


async def _refuse(call: Callable[[], Awaitable[Any]], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    raise Unauthenticated("send the right token as `authorization: bearer TOKEN`")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Our errors leave as google.rpc.Status; anything else as INTERNAL with a reference to the log."""

    def __init__(self) -> None:
        # By method: the handler, and the same handler guarded. Only methods that exist.
        self._guarded: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        name = handler_call_details.method
        original, guarded = self._guarded.get(name, (None, handler))
        if original is not handler:
            guarded = _guarded_by(handler, _translate_errors)
            self._guarded[name] = (handler, guarded)
        return guarded


async def _translate_errors(call: Callable[[], Awaitable[Any]], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    try:
        return await hide_unexpected_errors(call)
    except FanlightError as error:
        status = to_status(error)
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort raises")


async def hide_unexpected_errors(call: Callable[[], Awaitable[T]]) -> T:
    """The call's result. An unexpected exception becomes a FanlightError with a reference to the log."""
    try:
        return await call()
    except (FanlightError, grpc.aio.AbortError):
        raise
    except Exception as error:
        reference = uuid.uuid4().hex[:12]
        log.exception("handler_failed", reference=reference)
        raise FanlightError(f"internal error, reference {reference}") from error


Guard = Callable[[Callable[[], Awaitable[Any]], grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


def _guarded_by(handler: Handler, guard: Guard) -> Handler:
    """The same handler, with every call and every message of a streamed response run by the guard."""
    behavior: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    deserialize = _lenient(handler.request_deserializer)

    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await guard(lambda: behavior(_checked(request), context), context)

    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        responses: Any = None

        async def following() -> Any:
            nonlocal responses
            if responses is None:
                responses = aiter(behavior(_checked(request), context))
            return await anext(responses, _END)

        try:
            while (response := await guard(following, context)) is not _END:
                yield response
        finally:
            if responses is not None:
                await responses.aclose()

    serialize = handler.response_serializer
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(unary, deserialize, serialize)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(stream, deserialize, serialize)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(unary, deserialize, serialize)
    return grpc.stream_stream_rpc_method_handler(stream, deserialize, serialize)


_END = object()


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A request whose bytes cannot be parsed as its type; `field` is the string that is not UTF-8, if that is why."""

    field: str


def _lenient(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Returns _Unreadable for bytes that cannot be parsed, for which gRPC itself would answer INTERNAL."""
    if deserialize is None:
        return None

    # protoc's stubs pass a message class's FromString.
    descriptor = getattr(getattr(deserialize, "__self__", None), "DESCRIPTOR", None)

    def lenient(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable(find_broken_string(descriptor, data) if descriptor else "")

    return lenient


def _checked(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        if request.field:
            raise InvalidField("must be UTF-8", field=request.field)
        raise InvalidField("cannot be read: it is truncated or not a message of this type", field="request")
    if hasattr(request, "__aiter__"):
        return _checked_all(request)
    refuse_at_edge(request)
    return request


async def _checked_all(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
