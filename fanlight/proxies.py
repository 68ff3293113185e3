"""Which proxy leads to an address: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, read as curl and Go read them.

Loopback is never asked of a proxy. Knows no connections, and of the network only how a name is resolved.
"""

import ipaddress
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

# How long a name may take to be resolved when the answer only decides whether a proxy is used.
RESOLVE_S = 2.0
HTTP_SCHEMES = ("http", "https")
SOCKS_SCHEMES = ("socks5", "socks5h")
_PORTS = {"http": 80, "https": 443}
# Names that no public resolver knows.
_INSIDE = (".localhost", ".local", ".internal", ".lan", ".home.arpa")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class BadProxy(ValueError):
    """A variable names no proxy; the message names the variable, and no password."""


def proxy_for(url: str, environ: Mapping[str, str] | None = None) -> str:
    """The proxy's address for an http(s) URL; empty where it is reached directly. BadProxy."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    environ = os.environ if environ is None else environ
    if is_loopback(host) or is_excepted(host, parts.port or _PORTS.get(parts.scheme, 0), environ):
        return ""
    names = [f"{parts.scheme}_proxy", "all_proxy"]
    # A web server hands the header `Proxy:` of a stranger to its CGI programs as HTTP_PROXY.
    if "REQUEST_METHOD" in environ:
        environ = {name: value for name, value in environ.items() if name != "HTTP_PROXY"}
    return first_proxy(names, environ)


def first_proxy(names: list[str], environ: Mapping[str, str], schemes: tuple[str, ...] = ()) -> str:
    """The value of the first of these variables that is set, of one of the schemes. BadProxy for one that is none."""
    for name in names:
        value = _value(name, environ).strip()
        if not value:
            continue
        proxy = checked(value, name)
        if not schemes or proxy.split(":", 1)[0] in schemes:
            return proxy
    return ""


def checked(value: str, name: str) -> str:
    """The proxy's address with its scheme. BadProxy."""
    address = value if "://" in value else f"http://{value}"
    scheme, _, rest = address.partition("://")
    scheme = {"socks": "socks5"}.get(scheme.lower(), scheme.lower())
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        is_whole = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_whole = False
    if scheme not in (*HTTP_SCHEMES, *SOCKS_SCHEMES) or not is_whole:
        raise BadProxy(
            f"{name} names no proxy that can be used: write http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT"
        )
    return f"{scheme}://{rest}"


def shown(proxy: str) -> str:
    """The proxy's host and port, without user and password."""
    return proxy.rpartition("@")[2].rpartition("://")[2].strip("/") if proxy else ""


def _value(name: str, environ: Mapping[str, str]) -> str:
    """Lower case wins, also where it is empty."""
    return environ.get(name, environ.get(name.upper(), ""))


def is_excepted(host: str, port: int, environ: Mapping[str, str]) -> bool:
    """Whether NO_PROXY lists the host: a name with its subdomains, an address, a network, each perhaps with a port."""
    listed = _value("no_proxy", environ).replace(",", " ").lower().split()
    return any(_matches(each, host.lower().rstrip("."), port) for each in listed)


def _matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    if entry.count(":") == 1 or entry.startswith("["):
        name, _, number = entry.rpartition(":")
        if number.isdigit():
            if int(number) != port:
                return False
            entry = name
    entry = entry.strip("[]")
    address = address_of(host)
    if address is None:
        name = entry.removeprefix("*").lstrip(".").rstrip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        network = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
    return address.version == network.version and address in network


def address_of(host: str) -> Address | None:
    """None for a name."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    address = address_of(host)
    return address.is_loopback if address else host.lower().rstrip(".") in ("localhost", "localhost.localdomain")


def is_inside(host: str) -> bool:
    """Whether the host is this machine or in a private network, by its name or by the addresses that it has.

    A name that cannot be resolved here is outside: perhaps the proxy knows it. Blocks for RESOLVE_S at most.
    """
    name = host.lower().rstrip(".")
    address = address_of(name)
    if address is not None:
        return not address.is_global
    if "." not in name or name.endswith(_INSIDE):
        return True
    addresses = _resolved(name)
    return bool(addresses) and not any(each.is_global for each in addresses)


def _resolved(name: str) -> list[Address]:
    pool = ThreadPoolExecutor(1, "resolve")
    try:
        found = pool.submit(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM).result(RESOLVE_S)
    except (OSError, UnicodeError, TimeoutError):
        return []
    finally:
        pool.shutdown(wait=False)
    return [address for each in found if (address := address_of(str(each[4][0])))]
