"""gRPC health check for container probes: `python -m fanlight.health [ADDRESS] [--service NAME]`, or `fanlight health`.

Starts quickly: no protobuf and no command line library. Without ADDRESS it checks the service whose address is in the
environment. Exit code 0: serving; 1: not serving, unknown service or unreachable. Prints the server's state.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

METHOD = "/grpc.health.v1.Health/Check"
# HealthCheckResponse with `status` = SERVING: field 1, a number, 1.
SERVING = b"\x08\x01"
TIMEOUT_S = 4.0
# The settings that say where a service listens.
ADDRESS_SETTINGS = ("FANLIGHT_GATEWAY_GRPC", "FANLIGHT_PREPROCESSOR_GRPC", "FANLIGHT_DIFFUSION_GRPC")
# In the answer's trailing metadata: the state's name, and a sentence about it.
STATE_KEY, MESSAGE_KEY = "fanlight-health", "fanlight-health-message"
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "localhost"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Which TLS server is the right one; the default: none, the server speaks no TLS."""

    roots: bytes = b""
    # The host name in its certificate, if that is not the one that is dialed.
    server_name: str = ""
    # The files of a certificate and its key, for a server that asks for them.
    certificate: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    is_serving: bool
    # For a person: the state, or why there is no answer.
    text: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    address = options.address or own_address(os.environ)
    if not address:
        parser.error(f"no server: name HOST:PORT, or set one of {', '.join(ADDRESS_SETTINGS)}")
    try:
        if options.address or options.ca_file:
            trust = _trust_of(options.ca_file or os.environ.get("FANLIGHT_TLS_CA_FILE", ""), options.server_name)
        else:
            trust = own_trust(address, os.environ, timeout_s=options.timeout_s)
        answer = ask(address, options.service, trust=trust, timeout_s=options.timeout_s)
    except OSError as error:
        answer = Answer(is_serving=False, text=str(error))
    print(f"{address}: {answer.text}", file=sys.stdout if answer.is_serving else sys.stderr)
    return 0 if answer.is_serving else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fanlight.health", description="Check whether a gRPC server is serving, and print its state."
    )
    parser.add_argument(
        "address", nargs="?", metavar="HOST:PORT", help="if left out, from the settings of this container's service"
    )
    parser.add_argument(
        "--service",
        default="",
        metavar="NAME",
        help="startup, liveness, readiness, or one of its services; if left out, the whole server",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="how long to wait for an answer (%(default)g)",
    )
    parser.add_argument(
        "--ca-file", default="", help="root certificates for a TLS server; if left out, FANLIGHT_TLS_CA_FILE"
    )
    parser.add_argument("--server-name", default="", help="the host name in the TLS server's certificate")
    return parser


def own_address(environ: Mapping[str, str]) -> str:
    """Where this container's service listens; empty where no setting says it."""
    setting = next((environ[name] for name in ADDRESS_SETTINGS if environ.get(name)), "")
    host, _, port = setting.rpartition(":")
    return f"{_EVERYWHERE.get(host, host)}:{port}" if port else ""


def _trust_of(ca_file: str, server_name: str) -> Trust:
    return Trust(roots=_read(ca_file), server_name=server_name) if ca_file else Trust()


def own_trust(address: str, environ: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> Trust:
    """For the server of this container: its certificate is the settings', or made by the gateway, for whatever name.

    FANLIGHT_TLS_CA_FILE is for the gateway that a worker calls, not for its own server. OSError if it has another one.
    """
    cert_file, key_file = environ.get("FANLIGHT_TLS_CERT_FILE", ""), environ.get("FANLIGHT_TLS_KEY_FILE", "")
    if not cert_file:
        cert_file, key_file = _made_by_gateway(environ)
    if not cert_file:
        return Trust()
    name = _name_in_certificate(address, cert_file, key_file, timeout_s)
    return Trust(roots=_read(cert_file), server_name=name, certificate=(cert_file, key_file)) if name else Trust()


def _made_by_gateway(environ: Mapping[str, str]) -> tuple[str, str]:
    """The files of the certificate that the gateway of this container made for itself; empty where it made none."""
    folder = os.path.join(environ.get("FANLIGHT_GATEWAY_DATA_DIR", ""), "tls")
    files = os.path.join(folder, "gateway.pem"), os.path.join(folder, "gateway.key")
    is_there = environ.get("FANLIGHT_GATEWAY_GRPC") and all(os.path.exists(each) for each in files)
    return files if is_there else ("", "")


def _name_in_certificate(address: str, cert_file: str, key_file: str, timeout_s: float) -> str:
    """A host name in the certificate of the server, which must be the one in the file; empty if it speaks no TLS."""
    import socket
    import ssl

    context = ssl.create_default_context(cafile=cert_file)
    context.check_hostname = False
    # The file need not have the root that signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_cert_chain(cert_file, key_file)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as plain,
            context.wrap_socket(plain) as secure,
        ):
            certificate: Mapping[str, Any] = secure.getpeercert() or {}
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            return ""
        raise
    # Of a wildcard, any name below it.
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    return names[0].replace("*", "health") if names else host


def _read(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()


def ask(address: str, service: str = "", *, trust: Trust | None = None, timeout_s: float = TIMEOUT_S) -> Answer:
    """What the server says about the service, or about itself."""
    name = service.encode()
    if len(name) > 127:
        raise ValueError("the service's name is too long")
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with _channel(address, trust or Trust()) as channel:
        try:
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            status, call = check.with_call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return Answer(is_serving=False, text=f"{error.code().name.lower()}: {error.details()}")
    word = "serving" if status == SERVING else "not serving"
    return Answer(is_serving=status == SERVING, text=word + _state_in(call))


def _state_in(call: grpc.Call) -> str:
    """Such as ` (draining: it stops once the running work has ended)`; empty for other servers than ours."""
    metadata = {key: str(value) for key, value in call.trailing_metadata() or ()}
    parts = [part for part in (metadata.get(STATE_KEY), metadata.get(MESSAGE_KEY)) if part]
    return f" ({': '.join(parts)})" if parts else ""


def _channel(address: str, trust: Trust) -> grpc.Channel:
    # A probe calls its own machine: the environment's proxy settings must not apply.
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if not trust.roots:
        return grpc.insecure_channel(address, options=options)
    if trust.server_name:
        options.append(("grpc.ssl_target_name_override", trust.server_name))
    chain, key = (_read(file) for file in trust.certificate) if trust.certificate else (None, None)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(trust.roots, key, chain), options=options)


if __name__ == "__main__":
    sys.exit(main())
