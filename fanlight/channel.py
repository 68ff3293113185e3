"""Opens gRPC channels: keepalive that suits home routers, message limits, bearer token, optional TLS."""

import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Home routers drop idle connections after one to five minutes. A silently broken connection is noticed after both times
# together, which is about as long as a lease lives.
KEEPALIVE_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 10_000

_NOT_GRPC = ("http:", "https:")


def channel_options(*, max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # Keepalive's own timeout does not bound the wait for a ping's answer; without this option it takes a minute.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 10_000),
    ]


def target_of(address: str) -> str:
    """gRPC's target: HOST:PORT itself; for several IP addresses, separated by commas, whichever answers.

    ValueError for anything else, before gRPC tries to resolve it as a name.
    """
    addresses = address.split(",")
    for each in addresses:
        host, _, port = each.rpartition(":")
        if not host or not port.isdigit() or each.startswith(_NOT_GRPC):
            raise ValueError("must be HOST:PORT of a gRPC server, such as 127.0.0.1:50051")
    if len(addresses) == 1:
        return address
    families = {_family(each) for each in addresses}
    if len(families) != 1 or "" in families:
        raise ValueError("several addresses must be IP addresses of one family")
    return f"{families.pop()}:{address}"


def _family(address: str) -> str:
    """`ipv4` or `ipv6`; empty for a host name."""
    try:
        return f"ipv{ipaddress.ip_address(address.rpartition(':')[0].strip('[]')).version}"
    except ValueError:
        return ""


def open_channel(
    address: str,
    *,
    token: str = "",
    ca_file: Path | None = None,
    certificate: tuple[Path, Path] | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """An async channel to `address`, with TLS when `ca_file` has the root certificates. It dials nothing yet.

    `certificate`: PEM files of a chain and its key, for a server that asks its callers for one.
    Several IP addresses, separated by commas, are gateways that share a store: when one fails, the next one is dialed.
    """
    address = target_of(address)
    options = channel_options(max_message_bytes=max_message_bytes)
    interceptors = bearer_interceptors(token) if token else []
    if ca_file is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    chain, key = (file.read_bytes() for file in certificate) if certificate else (None, None)
    credentials = grpc.ssl_channel_credentials(ca_file.read_bytes(), key, chain)
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


class _Bearer:
    """Adds the token to a call's metadata."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"bearer {token}")

    def _details(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._entry)
        return grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )


class _UnaryUnary(_Bearer, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self._details(client_call_details), request)


class _UnaryStream(_Bearer, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self._details(client_call_details), request)


class _StreamUnary(_Bearer, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._details(client_call_details), request_iterator)


def bearer_interceptors(token: str) -> Sequence[grpc.aio.ClientInterceptor]:
    return [_UnaryUnary(token), _UnaryStream(token), _StreamUnary(token)]
