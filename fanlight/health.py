"""gRPC health check for container probes: `python -m fanlight.health [ADDRESS] [--service NAME]`.

Starts quickly: no protobuf and no command line library. Without ADDRESS it checks the service whose address is in the
environment. Exit code 0: serving; 1: not serving, unknown service or unreachable.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

import grpc

METHOD = "/grpc.health.v1.Health/Check"
# HealthCheckResponse with `status` = SERVING: field 1, a number, 1.
SERVING = b"\x08\x01"
TIMEOUT_S = 4.0
# The settings that say where a service listens.
ADDRESS_SETTINGS = ("FANLIGHT_GATEWAY_GRPC", "FANLIGHT_PREPROCESSOR_GRPC", "FANLIGHT_DIFFUSION_GRPC")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "localhost"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fanlight.health", description="Check whether a gRPC server is serving."
    )
    parser.add_argument(
        "address",
        nargs="?",
        metavar="HOST:PORT",
        default=own_address(os.environ),
        help="if left out, from the settings of this container's service",
    )
    parser.add_argument(
        "--service", default="", metavar="NAME", help="one of its services; if left out, the whole server"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="how long to wait for an answer (%(default)g)",
    )
    parser.add_argument(
        "--ca-file", default=os.environ.get("FANLIGHT_TLS_CA_FILE", ""), help="root certificates for a TLS server"
    )
    parser.add_argument("--server-name", default="", help="the host name in the TLS server's certificate")
    options = parser.parse_args(arguments)
    if not options.address:
        parser.error(f"no server: name HOST:PORT, or set one of {', '.join(ADDRESS_SETTINGS)}")
    problem = problem_of(
        options.address,
        options.service,
        timeout_s=options.timeout_s,
        ca_file=options.ca_file,
        server_name=options.server_name,
    )
    print(f"{options.address}: {problem or 'serving'}", file=sys.stderr if problem else sys.stdout)
    return 1 if problem else 0


def own_address(environ: Mapping[str, str]) -> str:
    """Where this container's service listens; empty where no setting says it."""
    setting = next((environ[name] for name in ADDRESS_SETTINGS if environ.get(name)), "")
    host, _, port = setting.rpartition(":")
    return f"{_EVERYWHERE.get(host, host)}:{port}" if port else ""


def problem_of(
    address: str, service: str = "", *, timeout_s: float = TIMEOUT_S, ca_file: str = "", server_name: str = ""
) -> str:
    """Empty where the server serves, else why not."""
    name = service.encode()
    if len(name) > 127:
        raise ValueError("the service's name is too long")
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with _channel(address, ca_file, server_name) as channel:
        try:
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            answer = check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name.lower()}: {error.details()}"
    return "" if answer == SERVING else "not serving"


def _channel(address: str, ca_file: str, server_name: str) -> grpc.Channel:
    # A probe calls its own machine: the environment's proxy settings must not apply.
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if not ca_file:
        return grpc.insecure_channel(address, options=options)
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    with open(ca_file, "rb") as file:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(file.read()), options=options)


if __name__ == "__main__":
    sys.exit(main())
