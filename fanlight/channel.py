"""Opens gRPC channels: keepalive that suits home routers, message limits, bearer token, TLS, the proxy.

Loopback is called in plain text unless roots are named; other addresses with TLS unless plain text is asked for.
"""

import ipaddress
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from fanlight.proxies import checked, first_proxy, is_excepted, is_inside, is_loopback

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Home routers drop idle connections after one to five minutes. A silently broken connection is noticed after both times
# together, which is about as long as a lease lives.
KEEPALIVE_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 10_000

# Which proxy gRPC uses for addresses that are neither loopback nor private: `off`, a proxy's address, or empty for
# what the environment names for gRPC or the web.
PROXY_SETTING = "FANLIGHT_GRPC_PROXY"
PROXY_OFF = "off"
_PROXY_NAMES = ["grpc_proxy", "https_proxy", "http_proxy", "all_proxy"]

_NOT_GRPC = ("http:", "https:")

# Turns TLS off beyond loopback, where no CA file is named.
PLAIN_TEXT_SETTING = "FANLIGHT_PLAIN_TEXT"
PLAIN_TEXT_WARNING = "calls travel in plain text: whoever is between reads the token, prompts and images"
ROOTS_FILE = "SSL_CERT_FILE"
# Where systems keep their roots, for Pythons that do not find them.
_SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")

# The token of the next call; a function where it changes.
Token: TypeAlias = "str | Callable[[], str]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How a channel is protected, and whom it takes for the server."""

    is_plain_text: bool = False
    # PEM root certificates; None: gRPC's own copy of the well-known ones.
    roots: bytes | None = field(default=None, repr=False)
    # The name that the server's certificate must have, in place of the dialed one.
    name: str = ""
    # PEM chain and key, for a server that asks its callers for a certificate.
    certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)


def is_local(address: str) -> bool:
    """Whether every address of HOST:PORT[,HOST:PORT] is loopback."""
    return all(is_loopback(each.rpartition(":")[0].strip("[]")) for each in address.split(","))


def security_of(
    address: str,
    *,
    ca_file: Path | None = None,
    certificate: tuple[Path, Path] | None = None,
    plain_text: bool = False,
) -> Security:
    """The rule above. OSError for a file that cannot be read; ValueError for roots that are none.

    `certificate`: PEM files of a chain and its key. `plain_text` is for addresses beyond loopback.
    """
    if ca_file is None and (plain_text or is_local(address)):
        return Security(is_plain_text=True)
    roots = read_roots(ca_file) if ca_file else system_roots()
    chain = (certificate[0].read_bytes(), certificate[1].read_bytes()) if certificate else None
    return Security(roots=roots, certificate=chain)


def read_roots(file: Path) -> bytes:
    """OSError, or ValueError where it has no certificates, which gRPC would tell in its own log only."""
    data = file.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except ssl.SSLError as error:
        raise ValueError(f"{file} has no PEM certificates, or a damaged one") from error
    return data


def system_roots(environ: Mapping[str, str] | None = None) -> bytes | None:
    """Those of SSL_CERT_FILE, or the system's; None where it has none. OSError or ValueError for a bad file."""
    named = (os.environ if environ is None else environ).get(ROOTS_FILE, "")
    if named:
        return read_roots(Path(named))
    for file in filter(None, (ssl.get_default_verify_paths().cafile, *_SYSTEM_ROOTS)):
        try:
            return Path(file).read_bytes()
        except OSError:
            continue
    return None


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


def proxy_options(address: str, environ: Mapping[str, str] | None = None) -> list[tuple[str, Any]]:
    """The channel's proxy: none to loopback, to private networks and to several addresses. ValueError for a bad one.

    gRPC speaks HTTP CONNECT to a proxy and no SOCKS; it reads only variables in lower case, and asks for any address.
    """
    environ = os.environ if environ is None else environ
    direct: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0)]
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if "," in address or is_loopback(host) or is_excepted(host, int(port), environ):
        return direct
    proxy = grpc_proxy(environ.get(PROXY_SETTING, ""), environ)
    return [("grpc.http_proxy", proxy)] if proxy and not is_inside(host) else direct


def grpc_proxy(setting: str, environ: Mapping[str, str]) -> str:
    """The proxy that the setting, or else the environment, names for gRPC; empty for none. ValueError."""
    if setting.strip().lower() == PROXY_OFF:
        return ""
    if not setting.strip():
        return first_proxy(_PROXY_NAMES, environ, ("http",))
    proxy = checked(setting.strip(), PROXY_SETTING)
    if not proxy.startswith("http://"):
        raise ValueError(f"{PROXY_SETTING} must be http://HOST:PORT or {PROXY_OFF}: gRPC uses no other kind of proxy")
    return proxy


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
    token: Token = "",
    ca_file: Path | None = None,
    certificate: tuple[Path, Path] | None = None,
    plain_text: bool = False,
    security: Security | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """An async channel to `address`. It dials nothing yet. ValueError for a bad address; OSError for unreadable files.

    `security`: in place of what `ca_file`, `certificate` and `plain_text` give by `security_of`.
    Several IP addresses, separated by commas, are gateways that share a store: when one fails, the next one is dialed.
    They share a certificate too, which must be for the first of the addresses.
    """
    target = target_of(address)
    security = security or security_of(address, ca_file=ca_file, certificate=certificate, plain_text=plain_text)
    options = [*channel_options(max_message_bytes=max_message_bytes), *proxy_options(address)]
    interceptors = bearer_interceptors(token) if token else []
    if security.is_plain_text:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    if name := security.name or _first_of_several(address):
        options.append(("grpc.ssl_target_name_override", name))
    chain, key = security.certificate or (None, None)
    credentials = grpc.ssl_channel_credentials(security.roots, key, chain)
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)


def _first_of_several(address: str) -> str:
    """The host that the certificate must have, because gRPC would take the whole list for it; empty for one address."""
    first, comma, _ = address.partition(",")
    return first.rpartition(":")[0].strip("[]") if comma else ""


class _Bearer:
    """Adds the token to a call's metadata."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def _details(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        token = self._token if isinstance(self._token, str) else self._token()
        entries = [("authorization", f"bearer {token}")] if token else []
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *entries)
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


def bearer_interceptors(token: Token) -> Sequence[grpc.aio.ClientInterceptor]:
    return [_UnaryUnary(token), _UnaryStream(token), _StreamUnary(token)]
