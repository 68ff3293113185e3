"""Where a server listens, and when that is safe."""

import ipaddress
import socket

from services.kernel.config import SettingsError


def split(address: str) -> tuple[str, int]:
    """Host without brackets, and port, of HOST:PORT."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    host, _ = split(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_tokens(address: str, tokens: dict[str, str], *, mutual_tls: bool) -> None:
    """SettingsError when anybody could call: off loopback without the named tokens or mutual TLS."""
    missing = [name for name, token in tokens.items() if not token]
    if missing and not mutual_tls and not is_loopback(address):
        raise SettingsError(
            f"{address} is not loopback: set {' and '.join(missing)} (or a _FILE of each), or mutual TLS"
        )


def expand(address: str) -> list[str]:
    """The addresses to bind: `localhost` is both loopbacks where the machine has them."""
    host, port = split(address)
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
