"""Asks a gRPC server how it is, for probes of containers: `python -m fanlight.health [ADDRESS] [--service NAME]`.

Quick to start: no protobuf and no command line library. ADDRESS is, where it is not given, that of the service whose
address the environment names. Exit code 0: serving; 1: not serving, unknown or not to be reached.
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
# Where a service of ours listens, by its own setting.
ADDRESS_SETTINGS = ("FANLIGHT_GATEWAY_GRPC", "FANLIGHT_PREPROCESSOR_GRPC", "FANLIGHT_DIFFUSION_GRPC")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "localhost"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fanlight.health", description="Is a gRPC server serving?")
    parser.add_argument(
        "address",
        nargs="?",
        metavar="HOST:PORT",
        default=own_address(os.environ),
        help="else that of the service whose settings are here",
    )
    parser.add_argument("--service", default="", metavar="NAME", help="one of its services, not the whole")
    parser.add_argument(
        "--timeout-s", type=float, default=TIMEOUT_S, metavar="SECONDS", help="for an answer (%(default)g)"
    )
    parser.add_argument("--ca-file", default=os.environ.get("FANLIGHT_TLS_CA_FILE", ""), help="roots of a TLS server")
    parser.add_argument("--server-name", default="", help="the name in the TLS server's certificate")
    asked = parser.parse_args(arguments)
    if not asked.address:
        parser.error(f"which server? Name HOST:PORT, or set one of {', '.join(ADDRESS_SETTINGS)}")
    trouble = trouble_of(
        asked.address, asked.service, timeout_s=asked.timeout_s, ca_file=asked.ca_file, server_name=asked.server_name
    )
    print(f"{asked.address}: {trouble or 'serving'}", file=sys.stderr if trouble else sys.stdout)
    return 1 if trouble else 0


def own_address(environ: Mapping[str, str]) -> str:
    """Where the service of this container can be asked; empty where no setting says."""
    setting = next((environ[name] for name in ADDRESS_SETTINGS if environ.get(name)), "")
    host, _, port = setting.rpartition(":")
    return f"{_EVERYWHERE.get(host, host)}:{port}" if port else ""


def trouble_of(
    address: str, service: str = "", *, timeout_s: float = TIMEOUT_S, ca_file: str = "", server_name: str = ""
) -> str:
    """Empty where the server serves, else why not."""
    name = service.encode()
    if len(name) > 127:
        raise ValueError("a service's name is shorter")
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with _channel(address, ca_file, server_name) as channel:
        try:
            ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            answer = ask(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name.lower()}: {error.details()}"
    return "" if answer == SERVING else "not serving"


def _channel(address: str, ca_file: str, server_name: str) -> grpc.Channel:
    # A probe asks its own machine: no proxy of the environment stands between.
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if not ca_file:
        return grpc.insecure_channel(address, options=options)
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    with open(ca_file, "rb") as file:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(file.read()), options=options)


if __name__ == "__main__":
    sys.exit(main())
