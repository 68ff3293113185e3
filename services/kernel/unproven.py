"""What callers hold before they have proved a credential: by address, the oldest first, and within limits.

When a new one exceeds a limit, the oldest gives way: a stranger who holds as many as possible ends only its own, and
a caller who proves a credential soon after is served, even from the same address. Knows neither sockets nor gRPC.
"""

import ipaddress
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Each = TypeVar("Each", bound=Hashable)

# All addresses of such a network are one customer's, as providers assign them.
IPV6_PREFIX = 64


class Unproven(Generic[Each]):
    def __init__(self, *, limit: int, limit_per_address: int) -> None:
        self._limit = limit
        self._limit_per_address = limit_per_address
        self._all: OrderedDict[Each, str] = OrderedDict()
        self._of_address: dict[str, OrderedDict[Each, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, each: Each) -> bool:
        return each in self._all

    def add(self, each: Each, address: str) -> list[Each]:
        """Count it; returns those that give way, which are no longer counted and which the caller must end."""
        network = network_of(address)
        self._all[each] = network
        mates = self._of_address.setdefault(network, OrderedDict())
        mates[each] = None
        given_way = []
        if len(mates) > self._limit_per_address:
            given_way.append(next(iter(mates)))
        elif len(self._all) > self._limit:
            given_way.append(next(iter(self._all)))
        for old in given_way:
            self.remove(old)
        return given_way

    def remove(self, each: Each) -> None:
        """It proved a credential, or it ended. Nothing happens if it is not counted."""
        network = self._all.pop(each, None)
        if network is None:
            return
        mates = self._of_address[network]
        del mates[each]
        if not mates:
            del self._of_address[network]

    def oldest(self, count: int) -> list[Each]:
        """Of all addresses, at most so many."""
        return [each for each, _ in zip(self._all, range(count), strict=False)]


def network_of(address: str) -> str:
    """What counts as one address: an IPv4 address, also where it is written as IPv6, or an IPv6 network."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False))
    return str(parsed)
