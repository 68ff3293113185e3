"""Which certificate a join code pins: looks at the chain that a gateway shows, before anything is trusted."""

import base64
import contextlib
import hashlib
import http.client
import socket
import ssl
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from fanlight.channel import proxy_options
from fanlight.contract.join_code import OWN_NAME
from fanlight.errors import Unauthenticated, Unavailable

HANDSHAKE_TIMEOUT_S = 10.0


def pinned_roots(address: str, authority: str) -> bytes:
    """The PEM of that certificate of the chain that the server at HOST:PORT shows whose sha256 is `authority`.

    Unauthenticated where it shows no such certificate; Unavailable where it cannot be reached.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Only to see the chain: what is trusted is decided by the digest, and checked in every later connection.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            contextlib.closing(_connected(address)) as connection,
            context.wrap_socket(connection, server_hostname=OWN_NAME) as tls,
        ):
            chain = _shown_chain(tls)
    except ssl.SSLError as error:
        raise Unauthenticated(
            f"the gateway at {address} does not speak TLS there, but the join code asks for it: check the port"
        ) from error
    except OSError as error:
        raise Unavailable(f"the gateway at {address} cannot be reached: {error.strerror or error}") from error
    for der in chain:
        if hashlib.sha256(der).hexdigest() == authority:
            return ssl.DER_cert_to_PEM_cert(der).encode()
    raise Unauthenticated(
        f"the gateway at {address} shows another certificate than the join code names: it is another gateway, or"
        " somebody is in between; make a new code with `fanlight nodes invite` if the gateway has a new certificate"
    )


def _shown_chain(tls: ssl.SSLSocket) -> Sequence[bytes]:
    """DER, the server's own first. Public since Python 3.13."""
    shown = tls if hasattr(tls, "get_unverified_chain") else tls._sslobj  # type: ignore[attr-defined]
    return [each if isinstance(each, bytes) else each.public_bytes(2) for each in shown.get_unverified_chain() or ()]


def _connected(address: str) -> socket.socket:
    """By the proxy that the gateway's channel will use, or directly. OSError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    proxy = urlsplit(str(dict(proxy_options(address)).get("grpc.http_proxy", "")))
    if not proxy.hostname:
        return socket.create_connection((host, int(port)), timeout=HANDSHAKE_TIMEOUT_S)
    tunnel = http.client.HTTPConnection(proxy.hostname, proxy.port or 80, timeout=HANDSHAKE_TIMEOUT_S)
    login = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}"
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if proxy.username else {}
    tunnel.set_tunnel(host, int(port), headers)
    try:
        tunnel.connect()
    except http.client.HTTPException as error:
        raise OSError(f"the proxy at {proxy.hostname} does not speak HTTP") from error
    return tunnel.sock
