"""Where webhooks may lead: to the outside, unless a network is allowed. Pure."""

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from fanlight.errors import InvalidField

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Well-known prefixes under which an IPv6 address stands for an IPv4 one, and where in it that begins.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
# One to four of them, each decimal, octal or hexadecimal.
_NUMBERS = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+)){0,3}", re.IGNORECASE)


def is_allowed(address: Address, allowed: Sequence[Network]) -> bool:
    """Private, loopback, link-local and other inward addresses only where a network says so."""
    meant = _meant(address)
    if any(each.version == network.version and each in network for network in allowed for each in (address, meant)):
        return True
    return meant.is_global and not meant.is_multicast and not meant.is_reserved


def _meant(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, or itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    embedded = address.ipv4_mapped or address.sixtofour
    if embedded is None and (address in _NAT64 or address in _COMPATIBLE):
        embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return embedded or address


def refuse_inward(url: str, allowed: Sequence[Network], *, field: str) -> None:
    """InvalidField for what can be told before names are resolved."""
    address = _address_of((urlsplit(url).hostname or "").rstrip("."))
    if address is not None and not is_allowed(address, allowed):
        raise InvalidField("leads inward, which this gateway does not allow", field=field)


def _address_of(host: str) -> Address | None:
    """None for a name. Numbers such as `2130706433` and `0x7f.1` are addresses wherever names are resolved."""
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.ip_address("127.0.0.1")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host)) if _NUMBERS.fullmatch(host) else None
    except OSError:
        return None
