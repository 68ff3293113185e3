"""Limits a gRPC server's connections by address, as long as they have carried no call that was let in.

gRPC tells nobody about its connections, but they are open files of this process: a sweep finds those with a local port
of the server, and ends the oldest above a limit. Knows no calls, only the peers of those that were let in.
"""

import asyncio
import contextlib
import os
import resource
import socket
import stat
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote

from services.kernel.logs import get_logger
from services.kernel.process import run_blocking
from services.kernel.unproven import network_of

log = get_logger()

# The open files of this process, on Linux and macOS.
OPEN_FILES = "/dev/fd"
SWEEP_S = 2.0
# A sweep over very many files runs less often, so that it takes at most this share of the time.
SWEEP_SHARE = 0.1
# Open files that the connections of gRPC leave to all else: those of HTTP, records and blobs.
RESERVED_FILES = 8_192

Inode = int
# An IP address as `network_of` writes it, except that IPv6 is not shortened to its network, and a port.
Peer = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLimits:
    # Connections that have carried no call that was let in: of one address, and in all.
    unproven_per_address: int = 512
    unproven: int = 2_048


@dataclass(frozen=True, slots=True)
class _Accepted:
    fd: int
    peer: Peer
    first_sweep: int


class GrpcConnections:
    def __init__(self, limits: PeerLimits | None = None) -> None:
        self._limits = limits or PeerLimits()
        self._sweeps = 0
        self._ports: set[int] = set()
        # By inode; None for a file that is no connection of ours.
        self._files: dict[Inode, _Accepted | None] = {}
        self._proven: set[Peer] = set()
        # Peers as gRPC writes them, since the last sweep.
        self._proved: set[str] = set()

    def listen_on(self, port: int) -> None:
        self._ports.add(port)

    def prove(self, peer: str) -> None:
        """A call from there was let in. `peer`: as gRPC writes it."""
        self._proved.add(peer)

    async def run(self) -> None:
        """Sweep until it is cancelled; on a thread, because many files take a while."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="grpc_connections") as executor:
            while True:
                begin_s = time.monotonic()
                ended = await run_blocking(executor, self.sweep)
                if ended:
                    log.warning("grpc_connections_ended", count=ended, reason="too many that sent no call with a token")
                await asyncio.sleep(max(SWEEP_S, (time.monotonic() - begin_s) / SWEEP_SHARE))

    def sweep(self) -> int:
        """End the oldest unproven connections above the limits; how many.

        Those of the last sweep or before: a younger one has had no time to prove anything.
        """
        self._sweeps += 1
        proved, self._proved = self._proved, set()
        self._look()
        # A copy: a call that began before the line above may still add to the old set.
        proved = proved.copy()
        accepted = {inode: each for inode, each in self._files.items() if each is not None}
        self._proven &= {each.peer for each in accepted.values()}
        self._proven |= {peer for each in proved if (peer := parse_peer(each)) is not None}
        unproven = {inode: each for inode, each in accepted.items() if each.peer not in self._proven}
        excess = self._excess(unproven)
        for inode in excess:
            _shut_down(unproven[inode].fd, inode)
            self._files[inode] = None
        return len(excess)

    def _look(self) -> None:
        """Find connections that are new, and forget those that are gone."""
        found: dict[Inode, _Accepted | None] = {}
        for fd, inode in _open_sockets():
            known = self._files.get(inode)
            found[inode] = known if inode in self._files else self._accepted(fd, inode)
        self._files = found

    def _accepted(self, fd: int, inode: Inode) -> _Accepted | None:
        with contextlib.suppress(OSError), _borrowed(fd, inode) as connection:
            if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            if connection.getsockname()[1] not in self._ports:
                return None
            address, port = connection.getpeername()[:2]
            return _Accepted(fd, (_plain(address), port), self._sweeps)
        return None

    def _excess(self, unproven: dict[Inode, _Accepted]) -> Sequence[Inode]:
        """The oldest of each address above its limit, and then of all."""
        by_age = sorted(unproven, key=lambda inode: unproven[inode].first_sweep)
        of_address: dict[str, list[Inode]] = defaultdict(list)
        for inode in by_age:
            of_address[network_of(unproven[inode].peer[0])].append(inode)
        limit = self._limits.unproven_per_address
        excess = {inode for mates in of_address.values() for inode in mates[: max(0, len(mates) - limit)]}
        rest = [inode for inode in by_age if inode not in excess]
        excess.update(rest[: max(0, len(rest) - self._limits.unproven)])
        return [inode for inode in excess if unproven[inode].first_sweep < self._sweeps]


def parse_peer(peer: str) -> Peer | None:
    """Of gRPC's `ipv4:ADDRESS:PORT` or `ipv6:[ADDRESS]:PORT`, which may be percent-encoded; None for others."""
    kind, _, rest = unquote(peer).partition(":")
    address, _, port = rest.rpartition(":")
    return (_plain(address.strip("[]")), int(port)) if kind in ("ipv4", "ipv6") and port.isdecimal() else None


def _plain(address: str) -> str:
    """Without a zone, and an IPv4 address as itself where it is written as IPv6."""
    return address.partition("%")[0].removeprefix("::ffff:")


def connections_limit() -> int:
    """How many connections gRPC may have, so that the process does not run out of open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(files // 2, files - RESERVED_FILES)


def _open_sockets() -> Iterator[tuple[int, Inode]]:
    try:
        names = os.listdir(OPEN_FILES)
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


@contextlib.contextmanager
def _borrowed(fd: int, inode: Inode) -> Iterator[socket.socket | None]:
    """Another descriptor of the socket; None where the number means another file by now."""
    with socket.socket(fileno=os.dup(fd)) as borrowed:
        yield borrowed if os.fstat(borrowed.fileno()).st_ino == inode else None


def _shut_down(fd: int, inode: Inode) -> None:
    """gRPC then reads the connection's end, and closes it."""
    with contextlib.suppress(OSError), _borrowed(fd, inode) as connection:
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)
